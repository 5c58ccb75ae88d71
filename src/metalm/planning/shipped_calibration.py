"""What is assumed of a device that nobody has calibrated: its data sheet, times shares that were measured.

All measured shares come from one H200 (`tools/measured/h200_2026-11-26.json`); on other devices they are
expected to be the same shares of their own data sheets, within wider limits.
"""

from __future__ import annotations

from metalm.planning.calibration import AttentionRate, Calibration, Figure, Link, Product
from metalm.planning.devices import DEVICES, Device

_H200 = "tools/measured/h200_2026-11-26.json"

_PRODUCT_SHARE = 0.745
"""Of the peak, over forward (774 TFLOP/s), input gradients (683) and weight gradients (780)."""
_ATTENTION = (
    AttentionRate("causal", 64, 349, 324),
    AttentionRate("causal", 128, 394, 375),
    AttentionRate("packed", 64, 212, 204),
    AttentionRate("packed", 128, 222, 217),
    AttentionRate("encoder", 64, 235, 250),
    AttentionRate("encoder", 128, 249, 259),
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
        "links inside nodes": _around(1.0, 0.25, 0.15, "assumed: 75% of the data sheet's, 56 to 86%"),
        "links between nodes": _around(1.0, 0.35, 0.2, "assumed: 75% of the data sheet's, 49 to 90%"),
        "memory": _around(bandwidth, 0.2 * bandwidth, 0.05 * bandwidth, measured + "; a large copy"),
        "kernel": Figure(5e-6, 3e-6, 1e-5, "assumed"),
        # Masters and moments are read and written, gradients read, weights written.
        "update": _around(30 / bandwidth, 5 / bandwidth, 30 / bandwidth, "30 bytes at the memory's rate"),
        "update in host memory": Figure(8e-9, 3e-9, 2e-8, "assumed: a node's cores shared by its ranks"),
        "gradients": _around(6 / bandwidth, 0.0, 4 / bandwidth, "6 bytes at the memory's rate"),
        "host, decoder layer": _around(4.8e-3, 1.5e-3, 0.5e-3, f"{_H200}, solved from three settings' steps"),
        "host, encoder layer": _around(3.6e-3, 1.0e-3, 0.5e-3, f"{_H200}, solved from three settings' steps"),
        "host, ZeRO 3 gather": _around(
            2.5e-3, 1.0e-3, 2.0e-3, f"{_H200}: 2.5 ms for a layer that is gathered whole"
        ),
        "host, micro-step": _around(2e-3, 1e-3, 3e-3, "assumed"),
        "host, step": _around(2e-2, 1e-2, 3e-2, "assumed"),
        "host not hidden": Figure(0.15, 0.0, 0.3, f"{_H200}: steps of three settings beside their kernels"),
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
            AttentionRate(r.mask, r.head_size, scale * r.forward_tflops, scale * r.both_tflops)
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
        "memory": 0.5 * device.memory_bandwidth,
        "kernel": 1e-5,
        "update": 6e-9,
        "update in host memory": 6e-9,
        "gradients": 1e-9,
        "host, decoder layer": 2e-3,
        "host, encoder layer": 1.5e-3,
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
