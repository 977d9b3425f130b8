"""Hopfield memory: modern retrieval, which is attention, its certificates, and the classical network of spins."""

from .certificate import Certificate, FixedPoint, hopfield_certificate
from .classical import ClassicalRetrieval, classical_hopfield_energy, classical_hopfield_retrieve
from .modern import Retrieval, hopfield_energy, hopfield_retrieve
from .module import Hopfield

__all__ = [
    "Certificate", "ClassicalRetrieval", "FixedPoint", "Hopfield", "Retrieval",
    "classical_hopfield_energy", "classical_hopfield_retrieve",
    "hopfield_certificate", "hopfield_energy", "hopfield_retrieve",
]  # fmt: skip
