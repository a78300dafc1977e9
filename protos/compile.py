"""Compiles `baton.proto` into `baton.binpb`: `python -m baton.protos.compile`, after each change of the .proto file.

What is committed is a descriptor set, not generated Python: a description cannot be too new for the installed runtime.
Needs grpcio-tools (a development dependency).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTO = HERE / "baton.proto"
COMPILED = HERE / "baton.binpb"


def compiled() -> bytes:
    """The serialised FileDescriptorSet of `baton.proto`. Raises `CalledProcessError` where protoc refuses the file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "baton.binpb"
        protoc = [sys.executable, "-m", "grpc_tools.protoc"]
        subprocess.run([*protoc, f"--proto_path={HERE}", f"--descriptor_set_out={out}", PROTO.name], check=True)
        return out.read_bytes()


if __name__ == "__main__":
    COMPILED.write_bytes(compiled())
