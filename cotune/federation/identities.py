"""Who takes part in a run: a key for each device, the registry of their public keys, and the run's secret.

    NAME.key         a device's Ed25519 key, mode 0600; only its device needs it
    registry.json    the public keys, for the server
    run.secret       mode 0600, the same for the server and all devices; directions come from it

A device can make its key itself (`DeviceKey.generate`), and then only its public key travels. More devices can be added
to a folder at any time, also to that of a run over Flower, which holds a registry and a secret under these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.errors import InputError
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry

REGISTRY_FILE, SECRET_FILE = "registry.json", "run.secret"


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What is in the folder.

    Attributes:
        folder: of the files.
        registry: of all devices, those that were there before included.
        keys: files of the devices that were named to get a key, by name.
        is_new_secret: whether the run's secret was made now.
    """

    folder: Path
    registry: Registry
    keys: Mapping[str, Path]
    is_new_secret: bool

    @property
    def registry_file(self) -> Path:
        """Of the public keys."""
        return self.folder / REGISTRY_FILE

    @property
    def secret_file(self) -> Path:
        """Of the run's secret."""
        return self.folder / SECRET_FILE


def make_identities(
    folder: Path | str, devices: Sequence[str] = (), known: Mapping[str, bytes] | None = None
) -> Identities:
    """Make keys of devices, and register them beside those that are registered already.

    No key and no secret is ever overwritten; where one thing cannot be written, nothing new is left. The registry is
    written last: a key that is there and not registered is what was left by a process that was killed, and is
    registered now.

    Args:
        folder: made where it is missing.
        devices: names of those that get a key here.
        known: public keys of those that made theirs themselves, by name.

    Raises:
        InputError: nobody is named, a name is none, comes twice or is registered already, a public key is none,
            a key, the registry or the secret that is there cannot be used, or the disk refuses.

    Example:
        >>> import tempfile
        >>> made = make_identities(Path(tempfile.mkdtemp()) / "identities", ["kitchen"])
        >>> sorted(path.name for path in made.folder.iterdir())
        ['kitchen.key', 'registry.json', 'run.secret']
    """
    folder, known = Path(folder), dict(known or {})
    if not devices and not known:
        raise InputError("no device is named, expected at least one; name the devices of the run")
    names = [*devices, *known]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r:.80} is named twice; give every device a name of its own")
    registry_file, secret_file = folder / REGISTRY_FILE, folder / SECRET_FILE
    registry = Registry.load(registry_file) if registry_file.exists() else Registry()
    keys = {name: folder / f"{name}.key" for name in devices}
    made: dict[str, DeviceKey] = {}
    for name in devices:
        # A name that is none, or is taken, is refused before its file is looked for.
        fresh = DeviceKey.generate()
        with_fresh = registry.add(name, fresh.public_key)
        if keys[name].exists():
            registry = registry.add(name, DeviceKey.load(keys[name]).public_key)
        else:
            made[name], registry = fresh, with_fresh
    for name, public_key in known.items():
        registry = registry.add(name, public_key)
    is_new_secret = not secret_file.exists()
    if not is_new_secret:
        # One that nobody could use is refused now and not at the first round.
        RunSecret.load(secret_file)
    written: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, key in made.items():
            key.save(keys[name])
            written.append(keys[name])
        if is_new_secret:
            RunSecret.generate().save(secret_file)
            written.append(secret_file)
        registry.save(registry_file)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
        raise
    return Identities(folder=folder, registry=registry, keys=keys, is_new_secret=is_new_secret)
