import importlib
import pkgutil

import pytest

import comol_ds

MODULES = [module.name for module in pkgutil.walk_packages(comol_ds.__path__, "comol_ds.")]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_finds_what_it_imports(module):
    assert importlib.import_module(module).__name__ == module
