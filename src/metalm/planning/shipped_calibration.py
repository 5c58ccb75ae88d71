"""What is assumed of a device that nobody has calibrated: its data sheet, times shares that were measured.

All measured shares come from one H200 (`tools/measured/h200_2026-11-27.json`, and what it lacks from the day
before); on other devices they are expected to be the same shares of their own data sheets, within wider
limits.
"""

from __future__ import annotations

from metalm.planning.calibration import AttentionRate, Calibration, Figure, Link, Product
from metalm.planning.devices import DEVICES, Device

_H200, _H200_BEFORE = (f"tools/measured/h200_2026-11-{day}.json" for day in (27, 26))

_PRODUCT_SHARE = 0.745
"""Of the peak, over forward (774 TFLOP/s), input gradients (683) and weight gradients (780)."""
_ATTENTION = (
    AttentionRate("causal", 64, 441, 486, 4096),
    AttentionRate("causal", 128, 592, 569, 4096),
    AttentionRate("packed", 64, 208, 204, 512),
    AttentionRate("packed", 128, 211, 207, 512),
    AttentionRate("encoder", 64, 235, 250, 1024),
    AttentionRate("encoder", 128, 263, 267, 1024),
)
_MEASURED_ON = DEVICES["h200"]
_MEMORY_SHARE = 0.864
"""Of the data sheet's bandwidth, in a large copy."""
_LINK_SHARE = 0.75


def shipped_calibration(device: Device) -> Calibration:
    """Of a device of the table."""
    if device is DEVICES["cpu"]:
        return _cpu(device)
    own = device is _MEASURED_ON
    scale = device.peak_tflops / _MEASURED_ON.peak_tflops
    spread = 1.0 if own else 1.5
    measured = f"{_H200}, one H200" + ("" if own else ", as a share of the data sheet's")
    bandwidth = _MEMORY_SHARE * device.memory_bandwidth
    figures = {
        "products": _around(1.0, 0.08 * spread, 0.06 * spread, measured),
        "attention": _around(1.0, 0.2 * spread, 0.3 * spread, measured),
        "attention, more keys": Figure(500, 300, 700, f"{_H200}: rows of 2,048 beside rows of 8,192"),
        "attention, dropout": Figure(2.4, 1.5, 3.5, f"{_H200}, solved from the vision-language setting"),
        "links inside nodes": _around(1.0, 0.25, 0.15, "assumed: 75% of the data sheet's, 56 to 86%"),
        "links between nodes": _around(1.0, 0.35, 0.2, "assumed: 75% of the data sheet's, 49 to 90%"),
        "memory": _around(bandwidth, 0.2 * bandwidth, 0.05 * bandwidth, measured + "; a large copy"),
        "kernel": Figure(5e-6, 3e-6, 1e-5, "assumed"),
        # Masters and moments are read and written, gradients read, weights written.
        "update": _around(30 / bandwidth, 5 / bandwidth, 30 / bandwidth, "30 bytes at the memory's rate"),
        "update in host memory": Figure(8e-9, 3e-9, 2e-8, "assumed: a node's cores shared by its ranks"),
        "gradients": _around(6 / bandwidth, 0.0, 4 / bandwidth, "6 bytes at the memory's rate"),
        # Measured before elementwise work was fused, which leaves half of the kernels to launch.
        "host, decoder layer": _around(4.8e-3, 2.4e-3, 0.5e-3, f"{_H200_BEFORE}, solved from three settings"),
        "host, encoder layer": _around(3.6e-3, 1.8e-3, 0.5e-3, f"{_H200_BEFORE}, solved from three settings"),
        "host, layer from a graph": Figure(1.5e-4, 1e-4, 4e-4, f"{_H200}: idle times of three settings"),
        "host, ZeRO 3 gather": _around(
            2.5e-3, 1.0e-3, 2.0e-3, f"{_H200_BEFORE}: 2.5 ms for a layer that is gathered whole"
        ),
        "host, micro-step": Figure(3e-3, 1e-3, 5e-3, f"{_H200}: idle times of three settings"),
        "host, step": Figure(8e-3, 4e-3, 2e-2, f"{_H200}: idle times of three settings"),
        "host not hidden": Figure(0.15, 0.0, 0.3, f"{_H200_BEFORE}: steps beside their kernels"),
        "traffic hidden": Figure(0.8, 0.5, 1.0, "assumed"),
        "imbalance": Figure(1.0, 0.5, 2.0, "computed from the sources' rows; the limits are assumed"),
    }
    latency = "latencies assumed"
    rates = "75% of the data sheet's"
    return Calibration(
        device=device.name,
        precision="bf16",
        products=(Product(8192, 2048, 8192, _PRODUCT_SHARE * device.peak_tflops),),
        attention=tuple(
            AttentionRate(r.mask, r.head_size, scale * r.forward_tflops, scale * r.both_tflops, r.keys)
            for r in _ATTENTION
        ),
        links=(
            *(Link(n, False, 10e-6 + n * 1e-6, _LINK_SHARE * device.intra_node) for n in (2, 4, 8)),
            *(
                Link(n, True, 20e-6 + 2e-6 * n, _LINK_SHARE * device.inter_node)
                for n in (2, 8, 32, 128, 512, 2048)
            ),
        ),
        figures=figures,
        sources={"products": measured, "attention": measured, "links": f"{rates}; {latency}"},
    )


def _cpu(device: Device) -> Calibration:
    """Orders of magnitude: `tools/calibrate.py` measures a machine in a minute."""
    assumed = "assumed, an order of magnitude: tools/calibrate.py measures a machine"
    values = {
        **dict.fromkeys(("products", "attention", "links inside nodes", "links between nodes"), 1.0),
        "attention, more keys": 0.0,
        "attention, dropout": 1.0,
        "memory": 0.5 * device.memory_bandwidth,
        "kernel": 1e-5,
        "update": 6e-9,
        "update in host memory": 6e-9,
        "gradients": 1e-9,
        "host, decoder layer": 2e-3,
        "host, encoder layer": 1.5e-3,
        "host, layer from a graph": 0.0,
        "host, ZeRO 3 gather": 2e-3,
        "host, micro-step": 4e-3,
        "host, step": 2e-2,
        "host not hidden": 1.0,
        "traffic hidden": 0.0,
        "imbalance": 1.0,
    }
    exact = ("host not hidden", "traffic hidden")
    return Calibration(
        device=device.name,
        precision="fp32",
        products=(Product(512, 512, 512, 0.6 * device.fp32_tflops),),
        attention=tuple(
            AttentionRate(mask, 64, 0.3 * device.fp32_tflops, 0.3 * device.fp32_tflops)
            for mask in ("causal", "packed", "encoder")
        ),
        links=tuple(Link(2, nodes, 2e-4, 0.3 * device.intra_node) for nodes in (False, True)),
        figures={
            name: Figure(v, v, v, assumed) if name in exact else Figure(v, v / 3, v * 3, assumed)
            for name, v in values.items()
        },
        sources=dict.fromkeys(("products", "attention", "links"), assumed),
    )


def _around(value: float, below: float, above: float, source: str) -> Figure:
    return Figure(value, value - below, value + above, source)
