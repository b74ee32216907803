"""What setup.cfg cannot say: a wheel also holds recipes, DeepSpeed configs and batch scripts of the checkout."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShippedFiles(build_py):
    """Copies them below ``esi_ds/shipped``, where that package looks for them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation reads the checkout's
            for name in ("configs", "ds_configs", "slurm"):
                target = Path(self.build_lib, "esi_ds", "shipped", name)
                copytree(name, target, ignore=ignore_patterns("logs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
