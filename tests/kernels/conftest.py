"""Without a GPU the kernels run in Triton's interpreter, which looks at the environment when they are defined."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    _original = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        _original(tensor, scope)
        # NumPy 2.4 makes no int of an array of one element.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor
