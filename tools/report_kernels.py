"""Registers, spills and shared memory of every Triton kernel, as launched on a device that is not here.

Compiles them ahead, a few seconds each, and prints a table in Markdown.

Example: python tools/report_kernels.py --head-sizes 64 128 256
"""

from __future__ import annotations

from metalm.cli import ToolParser, run_tool


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--capability", type=int, default=90, help="compute capability times ten")
    options = parser.parse_args()
    import triton

    from metalm.kernels.compile_report import compile_all, table_of

    print(f"Triton {triton.__version__}, compute capability {options.capability / 10}\n", flush=True)
    print(table_of(list(compile_all(options.head_sizes, capability=options.capability))))


if __name__ == "__main__":
    run_tool(main)
