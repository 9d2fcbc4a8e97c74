"""One request's life: from its matched prefix to its leaving, without SGLang's types. Read lifecycle.py first."""
