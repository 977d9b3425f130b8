"""Which models can be switched over, and switching them there and back."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from .attention import Place, attention_function, places
from .masks import model_mask

NAME = "causalattn"
# models inside `using`, and their layers
in_use: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()


def register() -> None:
    """Make attn_implementation="causalattn" known to transformers: the attention function and its mask; idempotent.

    Both go by the one name: without the second a model's mask is None, and causality and padding are lost.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> register()
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, model_mask)


def use(model: nn.Module) -> nn.Module:
    """Switch a transformers model to causalattn in place, and return it.

    Outputs stay within rounding of eager on real tokens; model(..., output_attentions=True) then puts an AttentionStats
    a layer into outputs.attentions. model.set_attn_implementation("sdpa") switches back.

    Raises:
        NotImplementedError: some attention of this family does not go through transformers' AttentionInterface, or adds
            a bias of its own; the sentence names the family.
        TypeError: model is not a transformers model.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> outputs = use(BertModel(small).eval())(torch.tensor([[5, 6, 7]]), output_attentions=True)
        >>> outputs.attentions[0].dag_score.shape
        torch.Size([1, 2])
    """
    numbers = {name: layer for layer, name in self_attention(model).items()}
    layers = tuple(sorted(numbers.values()))
    places.update({m: Place(numbers.get(name), layers) for name, m in attention_modules(model).items()})
    register()
    model.set_attn_implementation(NAME)
    return model


@contextmanager
def using(model: nn.Module) -> Iterator[nn.Module]:
    """Run with the model switched over; on leaving, every configuration and training flag is what it was.

    Inside another `using` of the same model it has nothing to do.
    """
    if model in in_use:
        yield model
        return
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        use(model).eval()
        in_use[model] = self_attention(model)
        yield model
    finally:
        in_use.pop(model, None)
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for module, training in modes:
            module.training = training


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that call the AttentionInterface, by their names; raises where a family cannot work."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    family = model.config.model_type
    found = {name: module for name, module in model.named_modules() if _code(module, "ALL_ATTENTION_FUNCTIONS")}
    outside = [type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel) and not _can_switch(m)]
    if not found or outside:
        raise NotImplementedError(
            f"{family} is not supported: the attention of {(outside or [type(model).__name__])[0]} does not go through "
            "transformers' AttentionInterface"
        )
    for module in found.values():
        if _code(module, "position_bias"):
            raise NotImplementedError(
                f"{family} is not supported: {type(module).__name__} adds a position bias to its scores"
            )
    return found


def self_attention(model: nn.Module) -> dict[int, str]:
    """The self-attention layers of a model: number → module name.

    The number is the module's own layer_idx where these are all given and all different, else its place in the model.
    """
    if model in in_use:
        return in_use[model]
    names = {n: m for n, m in attention_modules(model).items() if not _is_cross(n, m)}
    own = [getattr(module, "layer_idx", None) for module in names.values()]
    numbered = all(isinstance(i, int) for i in own) and len(set(own)) == len(own)
    return dict(zip(own if numbered else range(len(own)), names, strict=True))


def _is_cross(name: str, module: nn.Module) -> bool:
    words = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    return getattr(module, "is_cross_attention", False) or any(w in words for w in ("cross", "encoder_attn", "encdec"))


def _code(module: nn.Module, word: str) -> bool:
    """Whether a module's forward uses a global of this name, or passes a keyword of this name to a call."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return False
    keywords = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    return word in code.co_names or word in keywords


def _can_switch(model: nn.Module) -> bool:
    check = getattr(model, "_can_set_attn_implementation", None)
    return check is None or check()


def _configs(model: nn.Module) -> list:
    """Every configuration a model holds, sub-configurations included, each once."""
    found, waiting = {}, [m.config for m in model.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())
