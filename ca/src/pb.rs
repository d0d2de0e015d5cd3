//! Types generated from `proto/`.

/// `palisade.control.v1`.
#[expect(unreachable_pub, reason = "generated code")]
pub(crate) mod control {
    tonic::include_proto!("palisade.control.v1");
}

/// `palisade.mesh.v1`.
#[expect(unreachable_pub, reason = "generated code")]
pub(crate) mod mesh {
    tonic::include_proto!("palisade.mesh.v1");
}
