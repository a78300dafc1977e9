"""The wire: messages, their conversion, and gRPC."""

import os

# grpc's core would tell on standard error of each connection that ends; what matters of that, we log ourselves. It
# reads this once, when grpc is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
