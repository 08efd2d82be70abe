"""The writer of each dialect of runtime/bundle/dialects.py."""

from __future__ import annotations

from edgeskip.exporter.graphs.cpu import Cpu
from edgeskip.exporter.graphs.ort import OrtGrouped
from edgeskip.exporter.graphs.primitive import Layers, Primitive
from edgeskip.exporter.graphs.standard import Standard, StandardInputs
from edgeskip.exporter.graphs.writer import DialectWriter

WRITERS: dict[str, DialectWriter] = {
    writer.name: writer for writer in (Standard(), StandardInputs(), OrtGrouped(), Cpu(), Primitive(), Layers())
}
"""By name."""
