import pytest

from co2s_hf.geo.scene_files import find_scenes, plan_maps, scene_name, shared_out
from co2s_hf.utils.errors import UserFileNotFoundError, UserValueError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make and enter a folder with scenes/a.tif, deep/a.tif, b.JP2 and notes.txt, of 1, 2, 3 and 4 bytes."""
    (tmp_path / "scenes" / "deep").mkdir(parents=True)
    for size, name in enumerate(("a.tif", "deep/a.tif", "b.JP2", "notes.txt"), start=1):
        (tmp_path / "scenes" / name).write_bytes(b" " * size)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_patterns_and_addresses_name_scenes(folder):
    found = {scene: str(name) for scene, name in find_scenes(["scenes"]).items()}
    assert found == {"scenes/a.tif": "a", "scenes/b.JP2": "b", "scenes/deep/a.tif": "deep/a"}
    assert [str(name) for name in find_scenes(["scenes/notes.txt"]).values()] == ["notes"]  # GDAL opens more suffixes
    assert list(find_scenes(["scenes/*.tif"])) == ["scenes/a.tif"]
    long = "https://example.org/long.tif?signature=" + 300 * "a"
    assert [str(name) for name in find_scenes([long]).values()] == ["long"] and scene_name(long) == "long.tif"
    addresses = ["https://example.org/x/one.tif?token=a.b", "s3://bucket/two.tif", "/vsizip/a.zip/three.tif"]
    assert [str(name) for name in find_scenes(addresses).values()] == ["one", "two", "three"]
    assert str(find_scenes(['NETCDF:"cube.nc":rgb'])['NETCDF:"cube.nc":rgb']) == "cube_rgb"
    (folder / "scenes" / ".a.tif.unfinished").mkdir()
    (folder / "scenes" / ".a.tif.unfinished" / "a.tif").touch()
    assert len(find_scenes(["scenes", "./scenes/a.tif"])) == 3  # a.tif is named twice


def test_words_without_a_scene_and_maps_of_the_same_name_are_refused(folder):
    with pytest.raises(UserFileNotFoundError, match=r"'scenes/c.tif' matches no file; expected an existing file"):
        find_scenes(["scenes/c.tif"])
    (folder / "empty").mkdir()
    with pytest.raises(UserFileNotFoundError, match=r"The folder 'empty' has no scenes; expected .* end in .tif, .ti"):
        find_scenes(["empty"])
    message = r"'scenes/deep/a.tif' and 'scenes/a.tif' would have the same map, a.tif. Segment them in separate runs"
    with pytest.raises(UserValueError, match=message):
        find_scenes(["scenes/a.tif", "scenes/deep/a.tif"])


def test_maps_are_planned_outside_the_scenes_and_shared_among_processes(folder):
    assert {k: str(v) for k, v in plan_maps(["scenes/a.tif"], "out/land.tif").items()} == {
        "scenes/a.tif": "out/land.tif"
    }
    maps = plan_maps(["scenes"], "out")
    assert [str(path) for path in maps.values()] == ["out/a.tif", "out/b.tif", "out/deep/a.tif"]
    with pytest.raises(UserValueError, match=r"`output` is one file, 'land.tif', for 3 scenes; expected a folder"):
        plan_maps(["scenes"], "land.tif")
    with pytest.raises(UserValueError, match=r"`output` is .*the next run would read the maps as scenes"):
        plan_maps(["scenes"], "scenes/maps")
    (folder / "one").mkdir()
    (folder / "one" / "a.tif").touch()
    with pytest.raises(UserValueError, match=r"`output` is .*the next run would read the maps as scenes"):
        plan_maps(["one"], "one/map.tif")
    shares = shared_out(maps, 2)
    assert [list(share) for share in shares] == [["scenes/b.JP2", "scenes/a.tif"], ["scenes/deep/a.tif"]]


def test_an_output_with_the_suffix_of_another_file_is_refused(folder):
    for name in ("map.png", "out/map.GPKG"):
        message = rf"`output` is '{name}'; expected a name that ends in .tif .*, such as '.*map.tif', or a folder"
        with pytest.raises(UserValueError, match=message):
            plan_maps(["scenes/a.tif"], name)
    with pytest.raises(UserValueError, match=r"`output` is 'scenes/notes.txt'; expected"):
        plan_maps(["scenes/a.tif"], "scenes/notes.txt")  # an existing file
    (folder / "old.png").mkdir()
    for name in ("old.png", "maps.v2", "run_0.5"):  # folders
        assert {k: str(v) for k, v in plan_maps(["scenes/a.tif"], name).items()} == {"scenes/a.tif": f"{name}/a.tif"}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://me:secret@host/x/a.tif?sig=secret", "a.tif"),
        ("/vsicurl/https://me:secret@host/a.tif?sig=secret", "a.tif"),
        ("/vsicurl?use_head=no&url=https%3A%2F%2Fme%3Asecret%40host%2Fx%2Fa.tif%3Fsig%3Dsecret", "a.tif"),
        ("/vsicurl/https://me:secret@host", "HIDDEN@host"),
        ("https://proxy/https%3A%2F%2Fme%3Asecret%40host%3Fsecret", "https%3A%2F%2FHIDDEN@host%3FHIDDEN"),
    ],
)
def test_the_name_of_an_address_has_no_secret(address, name):
    assert scene_name(address) == name


def test_files_of_a_folder_that_are_no_scenes_are_named_with_the_reason(folder, caplog):
    find_scenes(["scenes"])
    assert not caplog.messages
    for name in ("c.png", "deep/d.JPG", "e.png", "a.png", "cube.nc", "labels.txt", ".hidden.png"):
        (folder / "scenes" / name).touch()
    assert sorted(find_scenes(["scenes"])) == ["scenes/a.tif", "scenes/b.JP2", "scenes/deep/a.tif"]
    assert caplog.messages == [  # a.png shows a.tif
        "3 files are left out of 'scenes' (.jpg, .png): pictures have no position on Earth. To predict them as "
        "images: `images=['scenes']`.",
        "1 file is left out of 'scenes' (.nc): such a file may contain several rasters. Name one of them, such as "
        "NETCDF:file.nc:band.",
    ]
