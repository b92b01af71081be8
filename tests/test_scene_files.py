import pytest

from co2s_hf.scene_files import find_scenes, plan_maps, scene_name, shared_out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """a.tif, b.jp2, deep/a.tif and a text, with sizes 1, 3, 2 and 4."""
    (tmp_path / "scenes" / "deep").mkdir(parents=True)
    for size, name in enumerate(("a.tif", "deep/a.tif", "b.JP2", "notes.txt"), start=1):
        (tmp_path / "scenes" / name).write_bytes(b" " * size)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_patterns_and_addresses(folder):
    found = {scene: str(name) for scene, name in find_scenes(["scenes"]).items()}
    assert found == {"scenes/a.tif": "a", "scenes/b.JP2": "b", "scenes/deep/a.tif": "deep/a"}
    assert [str(name) for name in find_scenes(["scenes/notes.txt"]).values()] == ["notes"]  # GDAL knows more suffixes
    assert list(find_scenes(["scenes/*.tif"])) == ["scenes/a.tif"]
    long = "https://example.org/long.tif?signature=" + 300 * "a"
    assert [str(name) for name in find_scenes([long]).values()] == ["long"] and scene_name(long) == "long.tif"
    addresses = ["https://example.org/x/one.tif?token=a.b", "s3://bucket/two.tif", "/vsizip/a.zip/three.tif"]
    assert [str(name) for name in find_scenes(addresses).values()] == ["one", "two", "three"]
    assert str(find_scenes(['NETCDF:"cube.nc":rgb'])['NETCDF:"cube.nc":rgb']) == "cube_rgb"
    (folder / "scenes" / ".a.tif.unfinished").mkdir()
    (folder / "scenes" / ".a.tif.unfinished" / "a.tif").touch()
    assert len(find_scenes(["scenes", "./scenes/a.tif"])) == 3  # named twice, the same one


def test_words_that_name_nothing(folder):
    with pytest.raises(FileNotFoundError, match=r"'scenes/c.tif' holds no scene: there is no such file"):
        find_scenes(["scenes/c.tif"])
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'empty' holds no scene: no file ends in .tif"):
        find_scenes(["empty"])
    with pytest.raises(ValueError, match=r"'scenes/deep/a.tif' and 'scenes/a.tif' would both become a.tif"):
        find_scenes(["scenes/a.tif", "scenes/deep/a.tif"])


def test_where_maps_go(folder):
    assert {k: str(v) for k, v in plan_maps(["scenes/a.tif"], "out/land.tif").items()} == {
        "scenes/a.tif": "out/land.tif"
    }
    maps = plan_maps(["scenes"], "out")
    assert [str(path) for path in maps.values()] == ["out/a.tif", "out/b.tif", "out/deep/a.tif"]
    with pytest.raises(ValueError, match=r"'land.tif' is one file for 3 scenes; name a folder"):
        plan_maps(["scenes"], "land.tif")
    with pytest.raises(ValueError, match="the next run would take maps for scenes"):
        plan_maps(["scenes"], "scenes/maps")
    (folder / "one").mkdir()
    (folder / "one" / "a.tif").touch()
    with pytest.raises(ValueError, match="the next run would take maps for scenes"):
        plan_maps(["one"], "one/map.tif")
    shares = shared_out(maps, 2)
    assert [list(share) for share in shares] == [["scenes/b.JP2", "scenes/a.tif"], ["scenes/deep/a.tif"]]
