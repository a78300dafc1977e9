"""The protobuf message classes, made at import by the installed runtime from the compiled description.

`pb.Submit`, `pb.StepReport` and so on are classes for the messages of `baton.proto`. They are untyped: only
`convert.py` touches them, and its round-trip tests cover each field.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from .compile import COMPILED


def _classes() -> dict[str, Any]:
    # A pool of our own: the process-wide one would refuse a second description under the same file name.
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    found = message_factory.GetMessageClassesForFiles([file.name for file in files], pool)
    return {name.rpartition(".")[2]: message for name, message in found.items()}


pb: Any = SimpleNamespace(**_classes())
