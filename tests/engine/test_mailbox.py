"""What a step's tokens become on their way out."""

from __future__ import annotations

from unittest.mock import Mock

from baton.common.messages import TokenOut
from baton.common.types import TokenLogprob
from baton.engine.cohort import Cohort
from baton.engine.mailbox import Outbox
from baton.engine.sequence import Sequence
from tests.toy import request


def test_each_router_hears_its_own_tokens_with_what_belongs_to_them() -> None:
    outbox = Outbox()
    outbox.routers |= {"a", "b"}
    owners = [Sequence((router, n), request("r", range(n + 5), 9), 1, 0.0, 9.0) for n, router in enumerate("abba")]
    asked = {1: TokenLogprob(-1.0), 3: TokenLogprob(-3.0)}
    outbox.token(("a", 9), 7, 70, TokenLogprob(-9.0))
    outbox.tokens(Cohort.of(owners), [4, 5, 6, 7], [50, 51, 52, 53], asked)
    mail = outbox.flush(Mock())
    assert mail is not None and not outbox
    assert list(mail.reports["a"].tokens) == [
        TokenOut(9, 7, 70, TokenLogprob(-9.0)), TokenOut(0, 4, 50), TokenOut(3, 7, 53, asked[3]),
    ]  # fmt: skip
    assert list(mail.reports["b"].tokens) == [TokenOut(1, 5, 51, asked[1]), TokenOut(2, 6, 52)]


def test_reports_are_in_the_order_of_who_was_told_first() -> None:
    """In every process alike: the simulator delivers them in this order."""
    outbox, names = Outbox(), list("hgfedcba")
    outbox.routers.update(names)
    owners = [Sequence((router, 1), request("r", range(5), 9), 1, 0.0, 9.0) for router in names]
    outbox.tokens(Cohort.of(owners), [4] * len(owners), [7] * len(owners), {})
    mail = outbox.flush(Mock())
    assert mail is not None and list(mail.reports) == names
