"""Read the binary model files of fastText 0.9.2."""

from __future__ import annotations

import pathlib
import struct
from io import BytesIO
from typing import Any

import numpy as np

from jaxpt import io


class ModelReader:
    """Reads the little-endian fields of a model file in order."""

    def __init__(self, file: pathlib.Path):
        """Read the file into memory."""
        self.stream = BytesIO(io.read_bytes(file))

    def read_fields(self, layout: str) -> tuple[Any, ...]:
        """Return the next fields; `layout` as in the module struct."""
        layout = f"<{layout}"
        data = self.stream.read(struct.calcsize(layout))
        return struct.unpack(layout, data)

    def read_array(self, dtype: str, n: int) -> np.ndarray:
        """Return the next n numbers."""
        n_bytes = n * np.dtype(dtype).itemsize
        data = self.stream.read(n_bytes)
        return np.frombuffer(data, dtype)

    def read_name(self) -> bytes:
        """Return the bytes up to the next zero byte."""
        name = b""
        while (byte := self.stream.read(1)) != b"\0":
            if not byte:
                raise ValueError("it ends inside a name")
            name += byte
        return name

    def read_quantized_matrix(self) -> np.ndarray:
        """Return product-quantized rows as [rows, dim] float32."""
        has_norms, n_rows, _, n_codes = self.read_fields("?qqi")
        codes = self.read_array("u1", n_codes).reshape(n_rows, -1)
        codebook = self.read_codebook()
        parts = []
        for k, centroids in enumerate(codebook):
            part_codes = codes[:, k]
            parts.append(centroids[part_codes])
        rows = np.concatenate(parts, 1)
        if not has_norms:
            return rows
        norm_codes = self.read_array("u1", n_rows)
        norms = self.read_codebook()[0]
        return rows * norms[norm_codes]

    def read_codebook(self) -> list[np.ndarray]:
        """Return the centroids of each part of a row, [256, width of the part]."""
        dim, n_parts, width, last_width = self.read_fields("4i")
        centroids = self.read_array("<f4", dim * 256)
        widths = [width] * n_parts
        widths[-1] = last_width
        parts = []
        for part_width in widths:
            size = 256 * part_width
            part = centroids[:size]
            parts.append(part.reshape(256, -1))
            centroids = centroids[size:]
        return parts
