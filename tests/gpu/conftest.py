"""Tests that need an accelerator. Where there is none they are not collected: no run reports them as skipped."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
