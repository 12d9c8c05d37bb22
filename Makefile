# `make test-fast` in an environment that has `.[all,test]`. The targets that name versions make environments of their own, beside each
# other in ENVIRONMENTS: with torch 2.6 and 2.14 these take 7 and 6 GB.
ENVIRONMENTS ?= .venvs
PYTHON311 ?= python3.11
PYTHON313 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3) python3.13)
# Where torch is absent: the tests of both backends and of PyTorch are left out.
TEST_JAX = PVE_TEST_WITHOUT=torch JAX_PLATFORMS=cpu $(1)/bin/python -m pytest -n 2
TEST_TORCH = PVE_TEST_WITHOUT=jax $(1)/bin/python -m pytest -n 2 tests/torch_impl tests/contract tests/shared
TEST_TOOLS = pytest pytest-xdist hypothesis scipy tokenizers
QUICK_JAX = tests/contract tests/jax_impl/test_private_api.py tests/jax_impl/test_documentation.py \
  tests/jax_impl/test_checkpoint.py tests/jax_impl/test_vocab_emb.py tests/jax_impl/test_meshes.py \
  tests/jax_impl/test_nnx.py tests/jax_impl/test_linen.py tests/jax_impl/test_equinox.py

.PHONY: test-fast test slow aot lint docs bench oldest-jax newest-jax test-oldest-jax test-newest-jax test-torch-2.6 test-torch-2.14

test-fast:
	python -m pytest -n 2 tests/contract/test_lookup.py tests/torch_impl/test_vocab_emb.py tests/jax_impl/test_vocab_emb.py \
	  tests/shared/test_partition.py tests/shared/test_config.py tests/consistency/test_isolation.py

test:
	python -m pytest -n 2

slow:
	python -m pytest -n 2 -m slow

aot:
	JAX_PLATFORMS=cpu python -m pytest -n 2 -m aot tests/jax_impl/test_aot.py

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

bench:
	python -m benchmarks

oldest-jax: $(ENVIRONMENTS)/oldest-jax
	$(call TEST_JAX,$<) $(QUICK_JAX)

newest-jax: $(ENVIRONMENTS)/newest-jax
	$(call TEST_JAX,$<) $(QUICK_JAX)

test-oldest-jax: $(ENVIRONMENTS)/oldest-jax
	$(call TEST_JAX,$<) tests/jax_impl tests/contract tests/shared

test-newest-jax: $(ENVIRONMENTS)/newest-jax
	$(call TEST_JAX,$<) tests/jax_impl tests/contract tests/shared

test-torch-2.6: $(ENVIRONMENTS)/torch-2.6
	$(call TEST_TORCH,$<)

test-torch-2.14: $(ENVIRONMENTS)/torch-2.14
	$(call TEST_TORCH,$<)

# An environment is there whole or not at all.
define environment
	@$(1) -c '' 2>/dev/null || { echo "$(1) is missing: install it, or name another with $(2)=" >&2; exit 1; }
	rm -rf $@
	$(1) -m venv $@
	{ $@/bin/python -m pip install -q -e '.[$(3)]' $(TEST_TOOLS) $(4) && \
	  $@/bin/python -m pip install -q --no-deps -c constraints.txt wordllama; } || { rm -rf $@; exit 1; }
endef

$(ENVIRONMENTS)/oldest-jax:
	$(call environment,$(PYTHON311),PYTHON311,jax,jax==0.8.2 jaxlib==0.8.2 'numpy==2.0.*' orbax-checkpoint flax equinox)

$(ENVIRONMENTS)/newest-jax:
	$(call environment,$(PYTHON313),PYTHON313,jax,flax equinox orbax-checkpoint)

$(ENVIRONMENTS)/torch-2.6:
	$(call environment,$(PYTHON311),PYTHON311,torch,torch==2.6.0 'numpy==2.0.*')

$(ENVIRONMENTS)/torch-2.14:
	$(call environment,$(PYTHON311),PYTHON311,torch,torch==2.14.1)
