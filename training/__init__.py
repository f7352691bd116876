"""Jobs that make bundles: gradient-boosted trees and nets, validated by purged walk-forward."""
