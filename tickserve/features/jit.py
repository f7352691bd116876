"""How the engine compiles: one arithmetic everywhere, so that stepped and columnar results are the same bits.

No fast-math, no vector maths library (SVML rounds differently inside a vectorised loop), NumPy's division rule (a zero
divisor gives inf or NaN, never an exception). Update functions are inlined into the two kernels of `kernels.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from tickserve.errors import ComponentError, MissingExtraError

os.environ["NUMBA_DISABLE_INTEL_SVML"] = "1"  # read once, when numba is first imported

try:
    import numba
except ImportError as error:
    raise MissingExtraError.of("numba", "stream") from error

from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

njit: Any = numba.njit  # numba's own stubs lack `_nrt`
config: Any = numba.config
# Without numba's reference counting a slice is a pointer and a length; counted, every feature of every event pays for
# it with atomic operations. The price: a kernel may not allocate, so it is handed every buffer it needs.
OPTIONS: Final = {"error_model": "numpy", "fastmath": False, "_nrt": False}
# Modules whose code is never inside a kernel.
_OUTSIDE: Final = frozenset({"__init__.py", "compile.py", "engine.py", "lookahead.py", "spec.py"})

if config.USING_SVML:
    raise ComponentError(
        "numba was imported with Intel SVML, whose vectorised functions round differently",
        field="NUMBA_DISABLE_INTEL_SVML",
        expected="1",
        was="0",
        hint="import tickserve.features.engine before numba, or set the variable",
    )

F = TypeVar("F", bound=Callable[..., Any])


def inlined(function: F) -> F:
    """Compile an update function so that its body lands inside the kernel that calls it."""
    return cast(F, njit(forceinline=True, **OPTIONS)(function))


def reinterpreted(source: str, target: str) -> Any:
    """A compiled function that takes the bits of a 64-bit `source` number as a `target` one, at no cost."""
    given, wanted = getattr(numba.types, source), getattr(numba.types, target)

    def of_types(_: Any, __: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, ___: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(wanted))

        return wanted(given), generate

    return intrinsic(of_types)


def _table(_: Any, words: Any, start: Any, shape: Any) -> tuple[Any, Any]:
    """`table(words, start, shape)`: `words[start:]` as an array of `shape`, unchecked. `reshape` is slower."""
    result = numba.types.Array(words.dtype, len(shape), "C")
    arrays: Any = arrayobj
    unpacked: Any = cgutils.unpack_tuple

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = arrays.make_array(signature.args[0])(context, builder, arguments[0])
        lengths = unpacked(builder, arguments[2], len(shape))
        item = context.get_constant(numba.types.intp, words.dtype.bitwidth // 8)
        strides = [item]
        for length in reversed(lengths[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        data = builder.gep(source.data, [arguments[1]])
        view = arrays.make_array(result)(context, builder)
        arrays.populate_array(view, data=data, shape=lengths, strides=strides, itemsize=item, meminfo=None)
        return view._getvalue()

    return result(words, numba.types.intp, shape), generate


table: Any = intrinsic(_table)


def kernel(signature: str) -> Callable[[F], F]:
    """Compile a kernel ahead for `signature`, from the cache on disk where it is there.

    Without any writable cache folder the kernel is compiled on every start.
    """

    def compile_it(function: F) -> F:
        try:
            return cast(F, njit(signature, cache=True, nogil=True, **OPTIONS)(function))
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return cast(F, njit(signature, nogil=True, **OPTIONS)(function))

    return compile_it


def source_fingerprint() -> int:
    """63 bits of a digest over the source files that end up in the kernels.

    numba's cache looks at the file of the kernel alone. The kernels capture this number, which is part of the
    cache key, so that an edit to any update function compiles anew instead of running yesterday's arithmetic.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name in _OUTSIDE:
            continue
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
