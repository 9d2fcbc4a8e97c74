"""What needs a GPU: kernels, serving beside stock SGLang, the cost of selection and of text alone, stress."""
