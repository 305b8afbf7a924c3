from _mockmod import getattr_factory

__getattr__ = getattr_factory(__name__)
