"""What the rows of a corpus depend on, so that a job is only ever resumed as what it was."""

import hashlib
import json

import torch
from torch import Tensor, nn

from .table import SCHEMA

# elements of each weight that are compared
SAMPLED = 1024


def settings_of(model: nn.Module, tokenizer, sources: list[dict], chosen: dict) -> dict:
    """The contents of _corpus.json: versions, the model, the tokenizer, the sources and what was chosen."""
    import transformers

    from .. import __version__

    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        "schema": SCHEMA,
        "causalattn": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "config": _hash(config),
        "weights": _weights(model),
        "tokenizer": _hash(_tokenizer(tokenizer)),
        "device": model.device.type,
        **chosen,
        "sources": sources,
    }


def first_difference(was: dict, now: dict) -> str | None:
    """The first setting that differs with both its values, or None."""
    was, now = _flat(was), _flat(now)
    for name in was | now:
        if was.get(name) != now.get(name):
            return f"{name} = {was.get(name)!r}, got {now.get(name)!r}"
    return None


def _flat(settings: dict) -> dict:
    """Each source by itself."""
    flat = {name: value for name, value in settings.items() if name != "sources"}
    for n, source in enumerate(settings.get("sources", ())):
        flat |= {f"sources[{n}].{name}": value for name, value in source.items()}
    return flat


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights(model: nn.Module) -> str:
    """Names, types, shapes and a sample of every weight: another training run differs in nearly all of them."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor):
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tokenizer(tokenizer) -> dict:
    """All that a fast tokenizer is made of, less how its last call cut and padded; of another its vocabulary."""
    own = {"class": type(tokenizer).__name__, "truncation_side": tokenizer.truncation_side}
    own |= {"limit": tokenizer.model_max_length, "special": tokenizer.all_special_tokens}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return own | {"vocabulary": tokenizer.get_vocab()}
    cut, padded = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    own["backend"] = hashlib.sha256(backend.to_str().encode()).hexdigest()
    if cut:
        backend.enable_truncation(**cut)
    if padded:
        backend.enable_padding(**padded)
    return own
