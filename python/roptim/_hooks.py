"""Functions that others want to have called around steps and state dicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from roptim._errors import RoptimTypeError, refuse, told

Hook = Callable[..., Any]

_ids = itertools.count()


class RemovableHandle:
    """What registering a hook returns: ``remove()`` takes the hook away, as leaving a ``with`` block does."""

    def __init__(self, hooks: dict[int, Hook]) -> None:
        self.id = next(_ids)
        self._hooks = hooks

    def remove(self) -> None:
        """Takes the hook away; a second time does nothing."""
        self._hooks.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register(hooks: dict[int, Hook], place: str, hook: Hook, prepend: bool = False) -> RemovableHandle:
    """Adds a hook behind the others, or in front of them."""
    if not callable(hook):
        raise refuse(RoptimTypeError, place, "hook", "callable", f"an object of type {type(hook).__name__}")
    handle = RemovableHandle(hooks)
    if prepend:
        others = dict(hooks)
        hooks.clear()
        hooks.update({handle.id: hook, **others})
    else:
        hooks[handle.id] = hook
    return handle


class Hooks:
    """The hooks of one optimizer, or those of all."""

    def __init__(self) -> None:
        self.step_pre: dict[int, Hook] = {}
        self.step_post: dict[int, Hook] = {}
        self.state_dict_pre: dict[int, Hook] = {}
        self.state_dict_post: dict[int, Hook] = {}
        self.load_state_dict_pre: dict[int, Hook] = {}
        self.load_state_dict_post: dict[int, Hook] = {}


#: Those of every optimizer: steps only.
EVERYWHERE = Hooks()


def register_optimizer_step_pre_hook(hook: Hook) -> RemovableHandle:
    """Calls ``hook(optimizer, args, kwargs)`` before every step of every optimizer.

    As :meth:`Optimizer.register_step_pre_hook`; these come first.
    """
    return register(EVERYWHERE.step_pre, "register_optimizer_step_pre_hook", hook)


def register_optimizer_step_post_hook(hook: Hook) -> RemovableHandle:
    """Calls ``hook(optimizer, args, kwargs)`` after every step of every optimizer.

    As :meth:`Optimizer.register_step_post_hook`; these come last.
    """
    return register(EVERYWHERE.step_post, "register_optimizer_step_post_hook", hook)


def _is_text(key: object) -> bool:
    return isinstance(key, str)


def stepped(own: Hook, optimizer: Any, hooks: Hooks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step with the hooks around it; ``args`` begin with the optimizer, as torch's do."""
    place = f"{type(optimizer).__name__}.step"
    for hook in [*EVERYWHERE.step_pre.values(), *hooks.step_pre.values()]:
        changed = hook(optimizer, args, kwargs)
        if changed is None:
            continue
        match changed:
            case ((first, *_) as args, dict() as kwargs) if first is optimizer and all(map(_is_text, kwargs)):
                pass
            case _:
                allowed = "None or a tuple of new args, the first of which is the optimizer, and new kwargs"
                raise refuse(RoptimTypeError, place, "what a step hook returns", allowed, told(changed))
    result = own(*args, **kwargs)
    for hook in [*hooks.step_post.values(), *EVERYWHERE.step_post.values()]:
        hook(optimizer, args, kwargs)
    return result
