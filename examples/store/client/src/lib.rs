//! Client of the sample store.

/// The contract as generated from `proto/store.proto`.
pub mod proto {
    #![allow(missing_docs, reason = "the contract has them")]
    tonic::include_proto!("palisade.store.v1");
}
