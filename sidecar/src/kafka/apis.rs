//! Which requests are understood, in which versions.

use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::{ApiKey, ApiVersionsRequest, ApiVersionsResponse};
use kafka_protocol::protocol::VersionRange;

use super::wire::{Head, MAX_PRODUCE_BYTES, MAX_REQUEST_BYTES, Malformed};

/// One kind of request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Api {
    pub(super) key: ApiKey,
    /// Its name, in records and metrics.
    pub(super) name: &'static str,
    pub(super) versions: VersionRange,
}

const fn api(key: ApiKey, name: &'static str, min: i16, max: i16) -> Api {
    Api { key, name, versions: VersionRange { min, max } }
}

/// All that are understood. None of these versions names a topic by an id, or tells addresses but in the answers to
/// Metadata, FindCoordinator and DescribeCluster.
pub(super) const APIS: [Api; 29] = [
    api(ApiKey::Produce, "Produce", 3, 9),
    api(ApiKey::Fetch, "Fetch", 4, 12),
    api(ApiKey::ListOffsets, "ListOffsets", 1, 7),
    api(ApiKey::Metadata, "Metadata", 0, 9),
    api(ApiKey::OffsetCommit, "OffsetCommit", 2, 8),
    api(ApiKey::OffsetFetch, "OffsetFetch", 1, 8),
    api(ApiKey::FindCoordinator, "FindCoordinator", 0, 4),
    api(ApiKey::JoinGroup, "JoinGroup", 0, 7),
    api(ApiKey::Heartbeat, "Heartbeat", 0, 4),
    api(ApiKey::LeaveGroup, "LeaveGroup", 0, 5),
    api(ApiKey::SyncGroup, "SyncGroup", 0, 5),
    api(ApiKey::DescribeGroups, "DescribeGroups", 0, 5),
    api(ApiKey::ListGroups, "ListGroups", 0, 4),
    api(ApiKey::ApiVersions, "ApiVersions", 0, 3),
    api(ApiKey::CreateTopics, "CreateTopics", 2, 7),
    api(ApiKey::DeleteTopics, "DeleteTopics", 1, 5),
    api(ApiKey::DeleteRecords, "DeleteRecords", 0, 2),
    api(ApiKey::InitProducerId, "InitProducerId", 0, 4),
    api(ApiKey::OffsetForLeaderEpoch, "OffsetForLeaderEpoch", 2, 4),
    api(ApiKey::AddPartitionsToTxn, "AddPartitionsToTxn", 0, 3),
    api(ApiKey::AddOffsetsToTxn, "AddOffsetsToTxn", 0, 3),
    api(ApiKey::EndTxn, "EndTxn", 0, 3),
    api(ApiKey::TxnOffsetCommit, "TxnOffsetCommit", 0, 3),
    api(ApiKey::DescribeConfigs, "DescribeConfigs", 1, 4),
    api(ApiKey::AlterConfigs, "AlterConfigs", 0, 2),
    api(ApiKey::IncrementalAlterConfigs, "IncrementalAlterConfigs", 0, 1),
    api(ApiKey::CreatePartitions, "CreatePartitions", 0, 3),
    api(ApiKey::DeleteGroups, "DeleteGroups", 0, 2),
    api(ApiKey::DescribeCluster, "DescribeCluster", 0, 1),
];

impl Api {
    pub(super) fn of(key: i16) -> Option<&'static Self> {
        APIS.iter().find(|api| api.key as i16 == key)
    }

    pub(super) fn takes(&self, version: i16) -> bool {
        (self.versions.min..=self.versions.max).contains(&version)
    }

    /// Longest frame of its requests.
    pub(super) fn max_bytes(&self) -> usize {
        if self.key == ApiKey::Produce { MAX_PRODUCE_BYTES } else { MAX_REQUEST_BYTES }
    }
}

/// What a broker says of itself, less what is not understood here.
pub(super) fn capped(head: &Head, frame: &Bytes) -> Result<Bytes, Malformed> {
    // A broker that is older than the question answers in version 0: in every version the error is the first.
    let unsupported = ResponseError::UnsupportedVersion.code().to_be_bytes();
    let version = if frame.get(4..6) == Some(&unsupported) { 0 } else { head.version };
    let told = head.answered::<ApiVersionsRequest>(version, frame)?;
    let mut known = ApiVersionsResponse::default();
    known.error_code = told.error_code;
    known.throttle_time_ms = if version > 0 { told.throttle_time_ms } else { 0 };
    known.api_keys = told.api_keys;
    known.api_keys.retain_mut(|told| {
        let Some(api) = Api::of(told.api_key) else { return false };
        told.min_version = told.min_version.max(api.versions.min);
        told.max_version = told.max_version.min(api.versions.max);
        told.unknown_tagged_fields.clear();
        told.min_version <= told.max_version
    });
    // What a cluster has agreed on beside versions is not told: one popular client fails over it (Debian 12's kcat).
    head.answer_in::<ApiVersionsRequest>(version, &known)
}

/// What a broker says to a version that it does not know (KIP-511): what it does know, in the oldest form.
pub(super) fn unsupported(correlation: i32) -> Result<Bytes, Malformed> {
    let mut known = ApiVersionsResponse::default();
    known.error_code = ResponseError::UnsupportedVersion.code();
    known.api_keys = APIS
        .iter()
        .filter(|api| api.key == ApiKey::ApiVersions)
        .map(|api| {
            ApiVersion::default()
                .with_api_key(api.key as i16)
                .with_min_version(api.versions.min)
                .with_max_version(api.versions.max)
        })
        .collect();
    Head::of(ApiKey::ApiVersions, 0, correlation).answer_in::<ApiVersionsRequest>(0, &known)
}
