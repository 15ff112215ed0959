"""Set-up of every test: models that tests build themselves may use kvmix's attention."""

from kvmix_cli.cache import register

register()
