"""Which files a model's own code consists of, and which references lead to it."""

from __future__ import annotations

from verl_autoexport.model import custom_code


def test_a_reference_is_good_only_where_its_class_is_defined(tmp_path):
    (tmp_path / "a.py").write_text("from .b import Other as Imported\nNamed = Imported\nclass Own: pass\n")
    (tmp_path / "broken.py").write_text("class (:\n")
    assert custom_code.is_good("a.Own", tmp_path)
    assert custom_code.is_good("org/name--a.Imported", tmp_path)
    assert custom_code.is_good("a.Named", tmp_path)
    refused = {"AutoModel": "a.FSDPOwn", "AutoConfig": ["gone.Own", None], "AutoTokenizer": "broken.Own"}
    assert custom_code.broken(refused, tmp_path) == ["a.FSDPOwn", "gone.Own", "broken.Own"]
    assert custom_code.localized({"A": "org/name--a.Own", "B": "org/name--c.X"}, tmp_path) == {
        "A": "a.Own", "B": "org/name--c.X",
    }  # fmt: skip


def test_relative_imports_are_followed_and_lead_nowhere_else(tmp_path):
    files = {
        "m.py": "from . import x\nfrom .sub.deep import y\nimport os\nfrom ..outside import z\n",
        "x.py": "from .m import m\n", "sub/deep.py": "from ..x import x\nfrom .near import n\n",
        "sub/near.py": "", "sub/__init__.py": "", "other.py": "", "../outside.py": "",
    }  # fmt: skip
    root = tmp_path / "model"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = {p.relative_to(root).as_posix() for p in custom_code.closure([root / "m.py"], root)}
    assert found == {"m.py", "x.py", "sub/deep.py", "sub/near.py"}
