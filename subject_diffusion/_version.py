"""The version, in one place: the build, `sdd --version` and CITATION.cff's test read it here."""

__version__ = "0.2.0"
