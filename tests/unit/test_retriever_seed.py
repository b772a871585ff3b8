"""The first start makes the collection `default` from the seed, and renews only what it made."""

import subprocess
import sys
from pathlib import Path

import pytest

from retriever_svc.build import build_collection
from retriever_svc.catalog import Catalog
from retriever_svc.seed import seed_default
from retriever_svc.source import from_parquet
from shared.errors import NotFound, StartupError
from tests.retriever_data import write_seed


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    return write_seed(tmp_path / "seed.parquet")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def generation(data_dir: Path, seed: Path) -> str:
    return Catalog.open(data_dir, seed=seed, device="cpu").get("default").generation


def test_an_empty_data_folder_is_seeded(data_dir: Path, seed: Path) -> None:
    catalog = Catalog.open(data_dir, seed=seed, device="cpu")
    assert [info.info.name for info in catalog.collections.values()] == ["default"]
    assert catalog.get("default").info.count == 50


def test_the_same_seed_is_not_built_twice(data_dir: Path, seed: Path) -> None:
    assert generation(data_dir, seed) == generation(data_dir, seed)


def test_a_changed_seed_makes_a_new_generation(data_dir: Path, seed: Path) -> None:
    before = generation(data_dir, seed)
    write_seed(seed, n=60)
    catalog = Catalog.open(data_dir, seed=seed, device="cpu")
    assert catalog.get("default").generation != before
    assert catalog.get("default").info.count == 60


def test_a_default_that_was_built_by_hand_is_never_replaced(data_dir: Path, seed: Path) -> None:
    own = build_collection(data_dir / "collections" / "default", from_parquet(seed))
    write_seed(seed, n=60)
    assert generation(data_dir, seed) == own


def test_a_seed_that_is_gone_leaves_what_was_made_of_it(data_dir: Path, seed: Path) -> None:
    before = generation(data_dir, seed)
    seed.unlink()
    assert generation(data_dir, seed) == before


def test_no_collection_and_no_seed_is_an_empty_service_that_says_what_to_do(data_dir: Path, tmp_path: Path) -> None:
    catalog = Catalog.open(data_dir, seed=tmp_path / "absent.parquet", device="cpu")
    assert catalog.collections == {}
    (warning,) = catalog.warnings
    assert "create one" in warning
    assert str(data_dir) in warning
    assert "RETRIEVER_SEED" in warning


def test_a_seed_that_cannot_be_used_is_named(data_dir: Path, seed: Path) -> None:
    seed.write_bytes(b"no parquet")
    with pytest.raises(StartupError, match=r"seed\.parquet cannot be used"):
        Catalog.open(data_dir, seed=seed, device="cpu")


def test_a_folder_that_cannot_be_written_still_serves_what_is_there(
    data_dir: Path, seed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generation(data_dir, seed)
    write_seed(seed, n=60)
    # root may write anywhere, so the file system's refusal is played
    monkeypatch.setattr("retriever_svc.seed.collection_lock", _read_only)
    assert generation(data_dir, seed) == before


def test_a_folder_that_cannot_be_written_and_is_empty_says_so(
    data_dir: Path, seed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever_svc.seed.collection_lock", _read_only)
    with pytest.raises(StartupError, match="make the data folder writable"):
        Catalog.open(data_dir, seed=seed, device="cpu")


def _read_only(collection: Path) -> None:
    raise OSError(30, "Read-only file system", str(collection))


def test_processes_that_start_at_once_build_it_once(data_dir: Path, seed: Path) -> None:
    start = (
        "import sys; from pathlib import Path; from retriever_svc.catalog import Catalog;"
        "print(Catalog.open(Path(sys.argv[1]), seed=Path(sys.argv[2]), device='cpu').get('default').generation)"
    )
    command = [sys.executable, "-c", start, str(data_dir), str(seed)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    names = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert len(set(names)) == 1
    assert [path.name for path in (data_dir / "collections/default/generations").iterdir()] == names[:1]


def test_a_folder_whose_name_no_request_could_ask_for_is_refused(data_dir: Path, seed: Path) -> None:
    build_collection(data_dir / "collections" / "Has Spaces", from_parquet(seed))
    with pytest.raises(StartupError, match="rename it"):
        Catalog.open(data_dir, seed=seed, device="cpu")


def test_an_unknown_collection_is_not_found(data_dir: Path, seed: Path) -> None:
    with pytest.raises(NotFound, match="there are: default"):
        Catalog.open(data_dir, seed=seed, device="cpu").get("other")


def test_seeding_without_a_seed_file_does_nothing(data_dir: Path, tmp_path: Path) -> None:
    seed_default(data_dir / "collections", tmp_path / "absent.parquet")
    assert not data_dir.exists()
