"""The policies that make a worker what it is: which of them it runs follows from its role, and changes with it."""

from __future__ import annotations

from ..common.errors import WrongRole
from ..common.messages import Purpose, Submit
from ..common.types import Role
from ..decode.role import DecodeRole
from ..engine import role as engine_role
from ..engine.mailbox import FromRouter, InboxItem
from ..engine.role import Computeless, Context, Host
from ..kvtransfer.transport import Inlet, Outlet
from ..prefill.role import PrefillRole
from .intake import Intake
from .sharing import CacheHost, Sharing


class Cast:
    """What every worker does stays over all its roles: taking handovers in, sharing what is cached. `play` adds what a
    role does beside it."""

    def __init__(self, context: Context, inlet: Inlet, outlet: Outlet) -> None:
        self._context = context
        self._outlet = outlet
        self._hosts: dict[Purpose, Host] = {Purpose.CACHE: CacheHost(context)}
        self._intake = Intake(context, inlet, self._hosts)
        self._sharing = Sharing(context, outlet)

    def play(self, role: Role) -> list[engine_role.Role]:
        """The policies of a role. Decode comes first: it takes its share of the step's budget before prefill does."""
        context, outlet = self._context, self._outlet
        self._hosts.pop(Purpose.DECODE, None)
        if role is Role.PREFILL:
            return [self._intake, PrefillRole(context, outlet), self._sharing]
        decode = self._hosts[Purpose.DECODE] = DecodeRole(context, self._intake, outlet)
        if role is Role.DECODE:
            return [self._intake, decode, NoPrompts(context), self._sharing]
        return [self._intake, decode, PrefillRole(context, outlet, decode), self._sharing]


class NoPrompts(Computeless):
    """Refuses what a router sends that has not heard yet that this worker does not prefill (any more)."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def receive(self, item: InboxItem, now: float) -> None:
        if isinstance(item, FromRouter) and isinstance(item.message, Submit):
            error = WrongRole(f"{self._context.ref.name} does not prefill")
            self._context.outbox.failed((item.router, item.message.ticket), error)
