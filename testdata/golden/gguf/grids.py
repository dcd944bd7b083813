"""Writes crates/tangent-ops/src/stored/grids.rs: ggml's tables of the IQ types, as the package gguf has them."""

import subprocess
from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).resolve().parents[3] / "crates/tangent-ops/src/stored/grids.rs"
# Values at a point, bits of a place.
TABLES = {"IQ1": ("IQ1_S", 8, 2), "IQ2_XXS": ("IQ2_XXS", 8, 2), "IQ2_XS": ("IQ2_XS", 8, 2), "IQ2_S": ("IQ2_S", 8, 2)}
TABLES |= {"IQ3_XXS": ("IQ3_XXS", 4, 4), "IQ3_S": ("IQ3_S", 4, 4)}

lines = [
    "//! Tables of the IQ types, written by `testdata/golden/gguf/grids.py`.",
    "//!",
    "//! They are ggml's (MIT, © The ggml authors). A point is one number, the place of its first value in",
    "//! the lowest bits: two bits for each of eight values, or four for each of four.",
]
for name, (kind, width, bits) in TABLES.items():
    traits = getattr(quants, kind)
    traits.init_grid()
    grid = traits.grid.reshape(-1, width)
    places = np.searchsorted(np.array(traits.grid_map), grid)
    assert (np.array(traits.grid_map)[places] == grid).all()
    points = (places << (bits * np.arange(width))).sum(axis=1)
    shown = ", ".join(f"{point:#06x}" for point in points)
    lines += ["", f"/// Points of {kind}.", f"pub(super) static {name}: [u16; {len(points)}] = [{shown}];"]
TARGET.write_text("\n".join(lines) + "\n")
subprocess.run(["rustfmt", "--edition", "2024", TARGET], check=True)
