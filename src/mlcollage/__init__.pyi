from .portraits.sitting import portrait as portrait

__version__: str
