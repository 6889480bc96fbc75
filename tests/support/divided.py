"""How a linear layer's step is divided among the programs of a GPU backend: the tiles of Triton's
kernels are chosen, those of CUDA's follow from the shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from strategies import AFFINE_OPTIONS, Case, Run, compare, device_of, pairwise, tolerances
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.types import Backend

Shape = tuple[int, int, int, int, int]

TABLE = pairwise(AFFINE_OPTIONS)
SMOOTH = {"frozen": None, "need_dx": True, "bias": True, "affine": True, "synthesizer_bias": True,
          "activation": "tanh", "max_norm": 0.0, "interface": "output"}  # fmt: skip
FULL = (torch.float32, torch.float32)

# Of Triton's linear kernel and of the synthesizer's, in the order of their Tiles.
TILES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # Several programs along both axes in every phase, the last ones only partly filled.
    "several": (
        ("several", 16, 32, 32, 16, 16, 32, 16, 32, 16, 4, 1),
        ("several", 16, 16, 16, 32, 16, 4, 1),
    ),
    # The same in one launch, in which a program has several tiles.
    "one": (
        ("one", 16, 16, 16, 16, 16, 32, 32, 16, 16, 4, 1),
        ("one", 16, 32, 32, 16, 16, 4, 1),
    ),
}
# On a GPU.
FAST_TILES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    name: (tiles, (tiles[0], 64, 32, 32, 64, 32, 4, 3))
    for name, tiles in {
        "one": ("one", 128, 16, 128, 16, 64, 32, 32, 64, 64, 8, 3),
        "one, rows divided": ("one", 64, 32, 64, 32, 64, 32, 64, 64, 64, 4, 3),
        "several": ("several", 128, 128, 128, 32, 128, 128, 64, 128, 32, 8, 3),
        "several, descriptors": (
            "several", 128, 128, 128, 32, 128, 128, 64, 128, 32, 8, 3, True,
        ),
    }.items()
}  # fmt: skip
TRITON_SHAPE = (35, 20, 37, 5, 7)
TRITON_LARGE = (300, 200, 328, 16, 10)
# Several tiles of CUDA's along both axes, the last ones only partly filled, for each shape of
# tiles: few rows, all rows in a tile, neither all rows nor all features in one.
CUDA_SHAPES = {
    "flat": (19, 20, 37, 5, 7),
    "tall": (45, 20, 37, 5, 7),
    "tall, not whole": (150, 20, 37, 5, 7),
    "square": (261, 20, 75, 5, 35),
}
CUDA_LARGE = {
    "flat": (30, 200, 328, 16, 10),
    "tall": (128, 200, 328, 16, 10),
    "square": (300, 200, 328, 16, 10),
}


@contextlib.contextmanager
def tiled(tiles: tuple[tuple[Any, ...], tuple[Any, ...]], **changes: Any) -> Iterator[None]:
    """Run all of Triton's ops on linear layers with these tiles, ``changes`` made to the linear
    kernel's."""
    from fused_dni.kernels import linear, synthesizer, tuning

    with contextlib.ExitStack() as stack:
        for op in ("step", "forward", "backward", "update"):
            made = linear.Tiles(*tiles[0])._replace(**changes)
            stack.enter_context(tuning.using(f"linear_{op}", made))
        for op in ("predict", "train"):
            stack.enter_context(tuning.using(f"synthesizer_{op}", synthesizer.Tiles(*tiles[1])))
        yield


class Way(NamedTuple):
    """A backend and how it divides a step."""

    backend: Backend
    shape: Shape
    tiles: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    @property
    def device(self) -> str:
        return device_of(self.backend)

    def divided(self) -> contextlib.AbstractContextManager[None]:
        """Divide so what runs inside."""
        return contextlib.nullcontext() if self.tiles is None else tiled(self.tiles)

    def grids(self) -> tuple[int, ...]:
        """How many blocks at the most are to be tried, where that is to be chosen; 0 for as many
        as there are."""
        return (0, 100, 64, 17, 3) if self.backend.name == "cuda" else (0,)

    def on(self, resident: int) -> None:
        """Have grids of so many blocks at the most."""
        if self.backend.name == "cuda":
            from cuda_machine import machine

            machine(resident=resident)

    def results(
        self, case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run
    ) -> dict[str, Tensor]:
        """What an op makes, on the CPU."""
        with self.divided():
            made = run(self.backend, case.to(*dtypes).on(self.device))
        return {name: t.cpu() for name, t in made.items()}

    def check(
        self, case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run
    ) -> dict[str, Tensor]:
        """The same, compared with the float64 reference within derived tolerances."""
        exact, allowed = tolerances(run, case, torch.finfo(dtypes[0]).eps)
        got = self.results(case, dtypes, run)
        compare(got, exact, allowed)
        return got


class Asked(NamedTuple):
    """A way that is made when a test asks for it."""

    backend: str
    name: str
    shape: Shape
    tiles: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    def made(self) -> Way:
        """The way, or a skip where its backend cannot run."""
        why_not = dict(registry.report())[self.backend]
        if why_not is not None:
            pytest.skip(f"{self.backend} {why_not}")
        return Way(registry.get(self.backend), self.shape, self.tiles)


def ways(*, shapes: bool = False, large: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test by ``way``, a fixture of test_gpu_linear.py.

    Args:
        shapes: with each of CUDA's shapes, not one alone.
        large: on a GPU, shapes and tiles that are worth one; all of them.
    """
    shape, tiles = (TRITON_LARGE, FAST_TILES) if large else (TRITON_SHAPE, TILES)
    found = [Asked("triton", name, shape, tiles[name]) for name in tiles]
    if large:
        found += [Asked("cuda", name, of) for name, of in CUDA_LARGE.items()]
    else:
        names = CUDA_SHAPES if shapes else ["tall"]
        found += [Asked("cuda", name, CUDA_SHAPES[name]) for name in names]
    marks = pytest.mark.gpu if large or torch.cuda.is_available() else ()
    rows = [pytest.param(way, marks=marks, id=f"{way.backend} {way.name}") for way in found]
    return pytest.mark.parametrize("way", rows, indirect=True)
