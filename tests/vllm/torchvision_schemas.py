"""
Lets a torchvision be imported whose compiled operators do not fit torch, such as PyPI's beside a CPU build of torch.

For the environment of `make test-vllm` alone, which copies this file there with a `.pth` file, because vLLM
starts processes of its own. torchvision gives two of its operators Python code while it is imported, and fails where
they are not declared; none of them is called by Qwen's processors.
"""

import importlib.abc
import importlib.util
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._torchvision_schemas = library  # declared for as long as this lives
        return importlib.util.find_spec("torchvision")


sys.meta_path.insert(0, _Finder())
