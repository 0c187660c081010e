"""Names and the objects behind them: tables of extensions, importing what a name says, checking its arguments.

What is registered is defined in the packages that own it. No kernels.
"""
