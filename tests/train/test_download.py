"""Files by URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import served

from python_train import UserError
from python_train.download import cache_folder, local_file


def test_a_url_is_fetched_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = tmp_path / "site"
    site.mkdir()
    (site / "vit.pth").write_bytes(b"0123456789")
    with served(site) as url:
        path = local_file(f"{url}/vit.pth")
        assert path.read_bytes() == b"0123456789"
        assert path.name == "vit.pth"
        assert path.parent.parent == cache_folder()
        (site / "vit.pth").unlink()
        assert local_file(f"{url}/vit.pth") == path
        with pytest.raises(UserError, match=r"cannot be fetched .*404"):
            local_file(f"{url}/other.pth")
    (site / "half.pth").write_bytes(b"0123456789")
    with served(site, cut=4) as url, pytest.raises(UserError, match=r"broke off after 6 of 10 bytes|cannot be fetched"):
        local_file(f"{url}/half.pth")
    assert [found for found in cache_folder().rglob("*") if found.is_file()] == [path]
