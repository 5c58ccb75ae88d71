"""lm-evaluation-harness's command line with the model class `metalm`.

For its releases that do not look for classes of installed packages; others know `metalm` by themselves, as
`lm_eval --model metalm`. All arguments are the harness's.

Example:
    python tools/evaluate_harness.py --model metalm --model_args pretrained=exported/demo --tasks hellaswag
"""

from __future__ import annotations

from metalm.cli import run_tool
from metalm.errors import ConfigError
from metalm.progress import Phase


def main() -> None:
    try:
        with Phase("loading lm-evaluation-harness"):
            from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install 'metalm[evaluation]'"
        ) from None

    with Phase("loading transformers"):
        import metalm.conversion.evaluation_harness  # noqa: F401 - registers the class

    cli_evaluate()


if __name__ == "__main__":
    run_tool(main)
