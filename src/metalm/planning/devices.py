"""What devices can do, from their vendors' data sheets: the one table that plans and utilisation use.

Peaks are dense, without sparsity. Link speeds are per device and per direction: `intra_node` of the fabric
inside a node, `inter_node` of the network cards that one device has to itself in the vendor's own systems.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalm.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Device:
    """One accelerator and how it is wired."""

    name: str
    peak_tflops: float
    """Dense bf16."""
    fp32_tflops: float
    """Without TF32, as torch computes by default."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes per second."""
    intra_node: float
    """Bytes per second to the other devices of the node."""
    inter_node: float
    """Bytes per second to other nodes."""
    per_node: int
    source: str


DEVICES = {
    "a100": Device(
        *("A100 SXM 80 GB", 312.0, 19.5, 80 * GB, 2.039e12, 300 * GB, 25 * GB, 8),
        "NVIDIA A100 data sheet: 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s a GPU",
    ),
    "a100_40": Device(
        *("A100 SXM 40 GB", 312.0, 19.5, 40 * GB, 1.555e12, 300 * GB, 25 * GB, 8),
        "NVIDIA A100 data sheet: 312 TFLOPS, 1,555 GB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s a GPU",
    ),
    "h100": Device(
        *("H100 SXM 80 GB", 989.4, 67.0, 80 * GB, 3.35e12, 450 * GB, 50 * GB, 8),
        "NVIDIA H100 data sheet: 989.4 TFLOPS, 3.35 TB/s, NVLink 900 GB/s both ways; DGX: 400 Gb/s a GPU",
    ),
    "h100_pcie": Device(
        *("H100 PCIe 80 GB", 756.0, 51.0, 80 * GB, 2.0e12, 64 * GB, 25 * GB, 8),
        "NVIDIA H100 data sheet: 756 TFLOPS, 2 TB/s, PCIe 5 128 GB/s both ways; network assumed 200 Gb/s",
    ),
    "h200": Device(
        *("H200 SXM 141 GB", 989.4, 67.0, 141 * GB, 4.8e12, 450 * GB, 50 * GB, 8),
        "NVIDIA H200 data sheet: 989.4 TFLOPS, 4.8 TB/s, NVLink 900 GB/s both ways; DGX H200: 400 Gb/s a GPU",
    ),
    "b200": Device(
        *("B200 SXM 180 GB", 2250.0, 75.0, 180 * GB, 8.0e12, 900 * GB, 50 * GB, 8),
        "NVIDIA DGX B200 data sheet, an eighth: 2.25 PFLOPS dense, 1,440 GB, 64 TB/s, NVLink 1.8 TB/s a GPU",
    ),
    "l40s": Device(
        *("L40S 48 GB", 362.0, 91.6, 48 * GB, 0.864e12, 32 * GB, 25 * GB, 8),
        "NVIDIA L40S data sheet: 362 TFLOPS, 864 GB/s, PCIe 4 64 GB/s both ways; network assumed 200 Gb/s",
    ),
    "mi300x": Device(
        *("MI300X 192 GB", 1307.4, 163.4, 192 * GB, 5.3e12, 448 * GB, 50 * GB, 8),
        "AMD MI300X data sheet: 1,307.4 TFLOPS, 5.3 TB/s, 7 links of 128 GB/s both ways; 400 Gb/s a GPU",
    ),
    "mi325x": Device(
        *("MI325X 256 GB", 1307.4, 163.4, 256 * GB, 6.0e12, 448 * GB, 50 * GB, 8),
        "AMD MI325X data sheet: 1,307.4 TFLOPS, 6 TB/s, 7 links of 128 GB/s both ways; 400 Gb/s a GPU",
    ),
    "cpu": Device(
        *("one rank on a few CPU cores", 0.1, 0.1, 16 * GB, 20e9, 5 * GB, 1 * GB, 64),
        "no data sheet: an order of magnitude for two cores with AVX-512",
    ),
}
"""By the name that `--gpu` takes."""

_CUDA_NAMES = {
    "B200": "b200",
    "H200": "h200",
    "H100 PCIe": "h100_pcie",
    "H100": "h100",
    "A100": "a100",
    "L40S": "l40s",
    "MI300X": "mi300x",
    "MI325X": "mi325x",
}
"""Parts of the names that drivers report; the first that is found holds."""


def find_device(name: str) -> Device:
    """The device of a `--gpu` name.

    Raises:
        ConfigError: there is none.
    """
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")
    return DEVICES[name]


def device_of_name(name: str) -> Device | None:
    """The device of a name of its own, or one that a driver reports; None where the table has none."""
    own = next((device for device in DEVICES.values() if device.name == name), None)
    return own or device_by_driver_name(name)


def device_by_driver_name(reported: str) -> Device | None:
    """The device of a name such as `NVIDIA H100 80GB HBM3`, None where the table has none."""
    return next((DEVICES[key] for part, key in _CUDA_NAMES.items() if part in reported), None)
