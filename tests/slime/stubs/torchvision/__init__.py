from _mockmod import getattr_factory

__getattr__ = getattr_factory(__name__)
__version__ = "0.28.0"
