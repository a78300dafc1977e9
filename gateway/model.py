"""What the gateway knows of the model it speaks for, from the checkpoint's folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.config import GatewayConfig
from ..common.errors import InvalidRequest
from .chat import ChatTemplate
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """`template` is None for a base model; `eos_ids` end a text and are no part of it."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, config: GatewayConfig) -> Model:
        """Raises `InvalidRequest` for a folder that is not a checkpoint."""
        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise InvalidRequest(f"{folder / 'config.json'} is missing: not a checkpoint folder", param="model")
        described = _read(folder / "config.json")
        try:
            vocab_size = int(described["vocab_size"])
            max_model_len = config.max_model_len or int(described["max_position_embeddings"])
        except KeyError as missing:
            raise InvalidRequest(f"{folder / 'config.json'} lacks {missing}", param="model") from None
        return cls(
            name=config.model_name,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_ids=_eos_ids(folder, described),
            tokenizer=Tokenizer.load(folder, vocab_size, max_model_len),
            template=ChatTemplate.load(folder),
        )


def _eos_ids(folder: Path, described: dict[str, Any]) -> frozenset[int]:
    """From both files that may name them, as the workers read them."""
    ids: set[int] = set()
    generation = folder / "generation_config.json"
    for source in (described, _read(generation) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", param="model") from error
    return found
