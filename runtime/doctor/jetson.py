"""What a Jetson says of itself: model, L4T and JetPack, power mode, the GPU's clock."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from edgeskip.runtime.host import command_output

_RELEASE = "etc/nv_tegra_release"
_JETPACKS = {
    "39.2.1": "7.2.1",
    "39.2.0": "7.2",
    "38.4.0": "7.1",
    "38.2.1": "7.0",
    "38.2.0": "7.0",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4.0": "6.1",
    "36.3.0": "6.0",
}
"""JetPack by L4T release, from NVIDIA's JetPack archive; other releases are told by their first number alone."""
_JETPACK_MAJORS = {39: "7", 38: "7", 36: "6", 35: "5", 34: "5", 32: "4"}
_GPU = re.compile(r"gpu|g[abpv]1\db")
"""A GPU's folder in devfreq: 17000000.gpu (Orin), 17000000.ga10b (JetPack 5), gpu-gpc-0 (Thor)."""


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this is a Jetson, on a carrier board from NVIDIA or anybody else."""
    with suppress(OSError):
        if (root / _RELEASE).exists():
            return True
    with suppress(OSError):
        return b"nvidia,tegra" in (root / "proc/device-tree/compatible").read_bytes()
    return False


def jetson_model(root: Path = Path("/")) -> str:
    """The board's name, as its device tree has it.

    Raises:
        OSError: there is none.
    """
    return (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")


def l4t_release(root: Path = Path("/")) -> str:
    """The release of Jetson Linux, such as 36.4.3, from a line like `# R36 (release), REVISION: 4.3, GCID: ...`.

    Raises:
        OSError, ValueError: the system does not tell.
    """
    text = (root / _RELEASE).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    if found is None:
        raise ValueError(f"{_RELEASE} says {text:.60}")
    return f"{found[1]}.{found[2]}"


def jetpack_version(l4t: str | None, root: Path = Path("/")) -> str:
    """JetPack's version: that of its package, which may not be installed, else the one that came with this L4T.

    Raises:
        OSError, ValueError: the system does not tell.
    """
    with suppress(OSError):
        version = command_output("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack", root=root)
        if re.match(r"\d+\.\d", version):
            return version.partition("+")[0].strip()
    if l4t is None:
        raise ValueError("neither a package nvidia-jetpack nor an L4T release")
    if l4t not in _JETPACKS and int(l4t.partition(".")[0]) not in _JETPACK_MAJORS:
        raise ValueError(f"L4T {l4t} belongs to no known JetPack")
    return _JETPACKS.get(l4t) or _JETPACK_MAJORS[int(l4t.partition(".")[0])]


def power_mode(root: Path = Path("/")) -> str:
    """The power mode's name, such as MAXN or 15W.

    Raises:
        OSError, ValueError: nvpmodel is missing, hangs, fails or says something else.
    """
    text = command_output("nvpmodel", "-q", root=root)
    found = re.search(r"^NV Power Mode[ \t]*:[ \t]*([ -~]+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"nvpmodel says {text[:60]!r}")
    return found[1].strip()


def gpu_clock_mhz(root: Path = Path("/")) -> tuple[float, float]:
    """The GPU's clock at this moment, and the highest that the power mode lets it have.

    Raises:
        OSError, ValueError: the system does not tell.
    """
    folders = (folder for folder in sorted((root / "sys/class/devfreq").glob("*")) if _GPU.search(folder.name))
    folder = next(folders, None)  # of Thor's gpu-gpc-0 and gpu-nvd-0, the one that computes
    if folder is None:
        raise FileNotFoundError("no GPU in sys/class/devfreq")
    now, highest = (int((folder / name).read_text(encoding="ascii")) / 1e6 for name in ("cur_freq", "max_freq"))
    return now, highest
