"""Data sets that are not here are downloaded once, and what arrives is checked."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pooch
import pytest
import torch
from small_datasets import FILES, by_name, parts

from models.datasets import load


@pytest.fixture
def publish(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Iterator[Callable[..., None]]:
    """Serves small files of a data set in place of its address, on a machine that does not have it."""
    folder = tmp_path_factory.mktemp("site")
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:

        def start(name: str, **changes: object) -> None:
            module, write = FILES[name]
            if not any(folder.iterdir()):  # the formats keep the time of writing, which would change the sums
                write(folder)
            sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
            assert sums.keys() == module.SOURCE.sha256.keys()
            here = {"url": f"http://127.0.0.1:{server.server_port}/", "sha256": sums, "installed": folder / "nowhere"}
            monkeypatch.setattr(module, "SOURCE", replace(module.SOURCE, **(here | changes)))
            monkeypatch.delenv(module.SOURCE.variable, raising=False)

        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr(pooch, "os_cache", lambda project: cache / project)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield start
        server.shutdown()
        thread.join()


@by_name
def test_a_data_set_is_downloaded_once_where_it_is_not_installed(name, publish, small_files):
    publish(name)
    downloaded = load(name)
    publish(name, url="http://127.0.0.1:9/")  # nobody answers there, and nobody is asked
    again = load(name)
    small_files(name)
    for one, two, three in zip(parts(downloaded), parts(again), parts(load(name)), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.images, three.images)
        assert torch.equal(one.labels, three.labels)


@by_name
def test_a_download_with_another_checksum_is_refused(name, publish):
    wrong = dict.fromkeys(FILES[name][0].SOURCE.sha256, "0" * 64)
    publish(name, sha256=wrong)
    first = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"hash of downloaded file \({first}\) does not match"):
        load(name)


@by_name
def test_a_failed_download_is_told_with_a_way_out(name, publish):
    publish(name, url="http://127.0.0.1:9/")
    variable = FILES[name][0].SOURCE.variable
    with pytest.raises(FileNotFoundError, match=rf"nowhere, and downloading it failed.*set {variable} to") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_where_no_package_has_the_data_set_the_variable_is_named(publish):
    publish("svhn", url="http://127.0.0.1:9/", installed=None)
    with pytest.raises(FileNotFoundError, match=r"no SVHN in \$SVHN_DIR, which is not set, and downloading it failed"):
        load("svhn")
