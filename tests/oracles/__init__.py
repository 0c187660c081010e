"""Independent oracles to check the library's numbers against.

Written from the definitions alone. Nothing here imports the library, so that no mistake can be on both sides.

    closed_forms   kernels of single units (linear, quadratic, sign, relu) for any number of parameters
    radial         kernels of single units under every radial law, by quadrature over radii and angles
    two_layer      nonlocal gradients of two-layer networks under every radial law
    quantised      a network with rounded weights and its nonlocal gradient
    sampling       kernels of any model from very many draws of the definition
    quadrature     nonlocal gradients and kernels of any function of at most three parameters
    autograd_loop  the local kernel by a plain autograd loop, one example at a time
    brute_force    gradients one at a time by automatic differentiation; block statistics by plain loops
    cases          a table of small models with their inputs
    statistics     assertions about random numbers: agreement, coverage, power
"""
