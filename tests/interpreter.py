"""What lets Triton's interpreter run the tests in a third of the time, without a change of what it computes."""

import functools

try:
    from triton.runtime import interpreter
except ImportError:  # the torch path is tested without Triton too
    interpreter = None


def call_with_room(test, **kwargs):
    """CPython maps a page of stack, and unmaps it, at each call that crosses a page's end: here the page is large."""
    return test(**kwargs)


call_with_room.__code__ = call_with_room.__code__.replace(co_stacksize=2**15)


def patch_once() -> None:
    """The interpreter searches and patches triton.language at each call of a function in a kernel: once will do."""
    interpreter._patch_builtin = patch_builtins
    patch = interpreter._patch_lang

    def patch_language(fn):
        languages = languages_of(fn)
        # one of its patches, which a launch's end takes away
        if languages and all(language.static_print is print for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_language


@functools.cache
def languages_of(fn) -> list:
    """Those of triton.language and its core that the function sees."""
    tl = interpreter.tl
    return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]


def patch_builtins(module, builder, scope) -> None:
    for name in builtins_of(module):
        member = getattr(module, name)
        if interpreter.tl.core.is_builtin(member):
            interpreter._patch_attr(module, name, member, builder, scope)


@functools.cache
def builtins_of(module) -> list[str]:
    return [name for name in dir(module) if interpreter.tl.core.is_builtin(getattr(module, name))]
