"""Adapters as folders of scipy matrices, for analysis elsewhere, and back.

``shira_to_csr`` writes a folder:

* one ``.npz`` for each sparse tensor, a CSR matrix that ``scipy.sparse.load_npz`` opens: the matrix view (spec, section 1),
  ``[shape[0], product of the other dimensions]``, every entry explicit, also where its value is zero. The data are float32,
  or float64 where the tensor is float64; narrower types widen exactly. They are deltas (what is added to the base), or
  targets (what the entries become); a mask has ones.
* ``index.json``: which file holds which tensor, its shape, dtype and the meaning of its data, digests, the provenance of the
  adapter, and the names of its whole tensors. File names are for people; the truth is here.
* ``original.st``: the adapter itself, as far as it was chosen, with what matrices cannot hold: whole tensors, the rows that
  a patch adds, and the exact bits, since a delta added to its base does not always give the bits of the target. It is a
  file of its own, not more members of the ``.npz``, because ``scipy.sparse.save_npz`` would drop those.

``csr_to_shira`` makes an adapter of such a folder. Each tensor of ``index.json`` follows the first rule that fits:

1. **Entries and data are as they were written**, which their digests tell, and ``original.st`` has the tensor: it is taken
   from there, bit for bit. ``base``, if given, is checked by the digest of its values.
2. **Masks**: the entries are the mask. The data must be ones.
3. **Targets**: the data, rounded to the tensor's dtype. The digest of the base's values comes from ``base``, or from the
   base values in ``original.st`` if all entries are among its entries, or, if the entries are as they were, from
   ``index.json``. Else it is an error: targets need the base.
4. **Deltas, and the base's values at the entries are at hand**, from ``base`` or ``original.st`` as above: targets, namely
   ``round(base + delta)`` (spec, section 4.1). An entry whose delta is as it was keeps the bits of its target.
5. **Deltas, and they are not**: deltas, which fit a base of any float dtype; if the entries are as they were, with the
   digest of the base's values.

``base`` is checked by that digest if the entries are as they were, and against the base values of ``original.st`` where it has
some; entries that are new cannot be checked. A tensor that is not in ``index.json`` any more is left out. ``original.st`` may be missing
if ``index.json`` does not name it, so that an adapter can be made of matrices from anywhere; whole tensors and patches need it.
"""

from __future__ import annotations

from shira_format.convert.csr.read import FromCsrReport, FromCsrTensor, csr_to_shira

__all__ = ["FromCsrReport", "FromCsrTensor", "csr_to_shira"]
