"""What other libraries are told of this package, once they are imported: importing the package imports none of them."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[Any], None]) -> None:
    """Call `action` with a module as soon as it has been imported; at once if it has been."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Finds its one module as the others do, and has its loader call the action in the end."""

    def __init__(self, name: str, action: Callable[[Any], None]):
        self.name, self.action, self.asking = name, action, False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.asking:
            return None
        self.asking = True  # the others only
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, watch: _Watch):
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self.watch)  # nothing is left of it
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.watch.action(module)


class Unimported(ModuleType):
    """
    Stands for a module in a table of transformers, and imports it when something of it is asked for.

    Args:
        name: of the module.
    """

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self.__name__), attribute)


# What the models room exports, by `model_type`
_CONFIGURATIONS = {
    "llada": "LLaDAConfig",
    "llada2_moe": "LLaDA2MoeConfig",
    "illada": "ILLaDAConfig",
    "Dream": "DreamConfig",
    "a2d-qwen2": "A2DQwen2Config",
    "a2d-qwen3": "A2DQwen3Config",
    "a2d-llama": "A2DLlamaConfig",
    "nemotron_labs_diffusion": "NemotronLabsDiffusionConfig",
    "sdar": "SDARConfig",
    "Fast_dLLM_Qwen": "FastDLLMQwenConfig",
}


def register_configurations(auto: Any) -> None:
    """
    Tell transformers' `configuration_auto` which model types this package has classes for.

    In the way of its own models: a type has the name of its class and a module, which is imported when a checkpoint of
    that type is first met. Ours then registers its model classes.
    """
    for model_type, class_name in _CONFIGURATIONS.items():
        auto.CONFIG_MAPPING._mapping[model_type] = class_name
        auto.CONFIG_MAPPING._modules[auto.model_type_to_module_name(model_type)] = Unimported("trl_diffusion.models")


def register_with_harness(models: Any) -> None:
    """Tell lm-evaluation-harness, whose `models` have just been imported, of its model `trl_diffusion`."""
    registry = getattr(import_module("lm_eval.api.registry"), "model_registry", None)
    if registry is not None:  # in older ones a model is known once its class is imported
        registry.register("trl_diffusion", target="trl_diffusion.evaluation.harness:DiffusionLM")
