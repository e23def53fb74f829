"""From notebooks to pages: parameters, fingerprints, execution, results, ledger, rendering."""
