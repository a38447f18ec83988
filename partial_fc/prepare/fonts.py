"""Named sets of fonts, fetched from Debian's archive without root; see `packages` for what the cache folder holds."""

from pathlib import Path

from partial_fc.prepare.packages import cache_folder, fetch_packages

_SMALL = """
    aoyagi-soseki arphic-ukai arphic-uming cwtex-heib dejima-mincho droid-fallback ipaexfont-mincho konatu
    kouzan-mouhitsu morisawa-bizud-mincho motoya-l-cedar seto unifont vlgothic wqy-zenhei
"""
_MEDIUM = f"""
    {_SMALL} aoyagi-kouzan-t babelstone-han cns11643-kai cns11643-sung cwtex-fs cwtex-kai cwtex-ming
    cwtex-yen dotgothic16 horai-umefont ipaexfont-gothic kiloji lxgw-wenkai morisawa-bizud-gothic noto-cjk
    rampart reggae rocknroll smiley-sans stick yozvox-yozfont-standard-kana yusei-magic
"""
_LARGE = """
    arphic-ukai arphic-uming babelstone-han cns11643-kai cns11643-sung droid-fallback hanazono ipamj-mincho
    lxgw-wenkai noto-cjk seto unifont wqy-zenhei
"""

FONT_SETS: dict[str, tuple[str, ...]] = {
    name: tuple(f"fonts-{word}" for word in words.split())
    for name, words in (("small", _SMALL), ("medium", _MEDIUM), ("large", _LARGE))
}
"""Set name -> Debian packages (of bookworm, section main)."""

INSTEAD = (
    "Any folder of TTF, OTF or TTC files does instead: `partial-fc prepare glyphs /folder OUT`, "
    "or `make demo FONTS=/folder`."
)


def font_cache() -> Path:
    """The folder that font sets are kept in between runs: `$PARTIAL_FC_CACHE/fonts`, or under ~/.cache."""
    return cache_folder("fonts")


def fetch_fonts(name: str, cache: Path) -> Path:
    """The folder with the unpacked packages of the font set `name`, fetched into `cache` unless it is there.

    Raises:
        ValueError: there is no such set.
        OSError: apt-get or dpkg is missing, or a package could not be downloaded or unpacked.
    """
    if name not in FONT_SETS:
        raise ValueError(f"no font set is named {name!r}; got {name!r}, want one of {', '.join(FONT_SETS)}. {INSTEAD}")
    return fetch_packages(FONT_SETS[name], Path(cache) / name, f"the font set {name!r}", INSTEAD)
