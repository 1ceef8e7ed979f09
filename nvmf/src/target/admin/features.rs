//! Get Features and Set Features: Base 5.1.11, 5.1.25.
//!
//! No feature is saved: values last until the controller is reset. Features that would steer hardware that there is none
//! of (arbitration, power, temperature, error recovery, write atomicity) are kept and given back, as hosts expect, and
//! have no effect.

use std::sync::atomic::Ordering;

use reactor::{Buffers, Instant};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Fault, Step, byte, enough, send};
use crate::spec::Status;
use crate::spec::command::{GetFeatures, NSID_ALL, Select, SetFeatures};
use crate::spec::feature::{
    AsyncEventConfig, Capabilities, ErrorRecovery, HostBehavior, HostIdentifier, NumberOfQueues, PowerManagement,
    TemperatureThreshold, VolatileWriteCache, WriteAtomicity, fid,
};
use crate::target::controller::{Controller, Kind};

/// Temperature threshold that is never reached: the default for "over".
const NEVER_OVER: u16 = 0xffff;
/// Temperature threshold that is never reached: the default for "under".
const NEVER_UNDER: u16 = 0;
/// Power states: one.
const POWER_STATES: u32 = 1;
/// TMPSEL: the composite temperature.
const COMPOSITE: u32 = 0x0;
/// TMPSEL of Set Features: all sensors.
const ALL_SENSORS: u32 = 0xf;

/// Values of the features that live nowhere else.
#[derive(Clone, Debug)]
pub(in crate::target) struct Features {
    arbitration: u32,
    power: u32,
    over_kelvin: u16,
    under_kelvin: u16,
    error_recovery: u32,
    write_atomicity: u32,
    pub(in crate::target) host_behavior: HostBehavior,
    /// What Connect asked for, rounded.
    default_kato_ms: u32,
    /// I/O queues without Set Features.
    pub(in crate::target) default_io_queues: u32,
}

impl Features {
    pub(in crate::target) fn new(default_kato_ms: u32, default_io_queues: u32) -> Features {
        Features {
            arbitration: 0,
            power: 0,
            over_kelvin: NEVER_OVER,
            under_kelvin: NEVER_UNDER,
            error_recovery: 0,
            write_atomicity: 0,
            host_behavior: HostBehavior::new_zeroed(),
            default_kato_ms,
            default_io_queues: default_io_queues.clamp(1, 0xffff),
        }
    }

    /// Back to the defaults, but for the keep alive timeout, which belongs to the association.
    pub(in crate::target) fn reset(&mut self) {
        *self = Features::new(self.default_kato_ms, self.default_io_queues);
    }
}

/// The features of each kind of controller, and whether they can be changed.
pub(super) const IO_FEATURES: [(u8, bool); 13] = [
    (fid::ARBITRATION, true),
    (fid::POWER_MANAGEMENT, true),
    (fid::TEMPERATURE_THRESHOLD, true),
    (fid::ERROR_RECOVERY, true),
    (fid::VOLATILE_WRITE_CACHE, false),
    (fid::NUMBER_OF_QUEUES, true),
    (fid::INTERRUPT_COALESCING, false),
    (fid::INTERRUPT_VECTOR, false),
    (fid::WRITE_ATOMICITY, true),
    (fid::ASYNC_EVENT_CONFIG, true),
    (fid::KEEP_ALIVE_TIMER, true),
    (fid::HOST_BEHAVIOR, true),
    (fid::HOST_IDENTIFIER, false),
];
pub(super) const DISCOVERY_FEATURES: [(u8, bool); 2] = [(fid::ASYNC_EVENT_CONFIG, true), (fid::KEEP_ALIVE_TIMER, true)];

/// The features of a kind of controller.
pub(super) fn supported(kind: Kind) -> &'static [(u8, bool)] {
    match kind {
        Kind::Io => &IO_FEATURES,
        Kind::Discovery => &DISCOVERY_FEATURES,
    }
}

fn check_supported(kind: Kind, wanted: u8) -> Result<bool, Fault> {
    let found = supported(kind).iter().find(|(fid, _)| *fid == wanted);
    found.map(|(_, changeable)| *changeable).ok_or(Fault::field(byte::CDW10))
}

impl Controller {
    pub(in crate::target) fn get_features(&mut self, get: &GetFeatures, data: &mut Buffers) -> Result<Step, Fault> {
        let changeable = check_supported(self.config.kind, get.fid)?;
        match get.select {
            Select::SupportedCapabilities => {
                Ok(Step::value(Capabilities::default().with_changeable(changeable.into()).0))
            }
            Select::Current => self.feature(get, data, self.features.clone()),
            // Nothing is saved, so that what is saved is the default (Base 4.4).
            Select::Default | Select::Saved => {
                let mut defaults = self.features.clone();
                defaults.reset();
                self.feature(get, data, defaults)
            }
        }
    }

    /// A feature's current value where `get` asks for it, otherwise its default.
    fn feature(&self, get: &GetFeatures, data: &mut Buffers, values: Features) -> Result<Step, Fault> {
        let current = get.select == Select::Current;
        Ok(Step::value(match get.fid {
            fid::ARBITRATION => values.arbitration,
            fid::POWER_MANAGEMENT => values.power,
            fid::TEMPERATURE_THRESHOLD => {
                let wanted = TemperatureThreshold(get.cdw11);
                let kelvin = match (wanted.tmpsel(), wanted.thsel()) {
                    (COMPOSITE, 0) => values.over_kelvin,
                    (COMPOSITE, 1) => values.under_kelvin,
                    _ => return Err(Fault::field(byte::CDW11)),
                };
                wanted.with_tmpth(kelvin.into()).0 & 0x003f_ffff
            }
            fid::ERROR_RECOVERY => values.error_recovery,
            fid::VOLATILE_WRITE_CACHE => VolatileWriteCache::default().with_wce(1).0,
            fid::NUMBER_OF_QUEUES => {
                let granted = self.config.shared.max_io_queues.load(Ordering::Relaxed).clamp(1, 0xffff);
                let count = if current { granted } else { values.default_io_queues };
                NumberOfQueues { submission: count, completion: count }.dw0()
            }
            fid::INTERRUPT_COALESCING => 0,
            // No interrupts, so no coalescing either: the vector, with CD set.
            fid::INTERRUPT_VECTOR => get.cdw11 & 0xffff | 1 << 16,
            fid::WRITE_ATOMICITY => values.write_atomicity,
            fid::ASYNC_EVENT_CONFIG if current => self.events.config().0,
            fid::ASYNC_EVENT_CONFIG => 0,
            fid::KEEP_ALIVE_TIMER if current => self.kato_ms,
            fid::KEEP_ALIVE_TIMER => values.default_kato_ms,
            fid::HOST_BEHAVIOR => return send(data, values.host_behavior.as_bytes()),
            fid::HOST_IDENTIFIER => {
                // Fabrics have 128-bit host identifiers only (Base 5.1.25.1.28).
                if HostIdentifier(get.cdw11).exhid() == 0 {
                    return Err(Fault::field(byte::CDW11));
                }
                return send(data, &self.config.shared.hostid);
            }
            other => unreachable!("feature {other:#04x} is listed as supported"),
        }))
    }

    pub(in crate::target) fn set_features(
        &mut self,
        set: &SetFeatures,
        data: &Buffers,
        now: Instant,
    ) -> Result<Step, Fault> {
        check_supported(self.config.kind, set.fid)?;
        if set.save {
            return Err(Fault::at(Status::FEATURE_NOT_SAVEABLE.dnr(), byte::CDW10 + 3));
        }
        self.check_feature_nsid(set)?;
        let cdw11 = set.cdw11;
        match set.fid {
            fid::ARBITRATION => self.features.arbitration = cdw11,
            fid::POWER_MANAGEMENT => {
                if PowerManagement(cdw11).ps() >= POWER_STATES {
                    return Err(Fault::field(byte::CDW11));
                }
                self.features.power = cdw11 & 0xff;
            }
            fid::TEMPERATURE_THRESHOLD => self.set_temperature(TemperatureThreshold(cdw11))?,
            fid::ERROR_RECOVERY => {
                // No namespace reports errors for deallocated blocks (NSFEAT.DAE).
                if ErrorRecovery(cdw11).dulbe() == 1 {
                    return Err(Fault::field(byte::CDW11 + 2));
                }
                self.features.error_recovery = cdw11 & 0xffff;
            }
            // The devices' caches cannot be switched off; that they are on already is no change.
            fid::VOLATILE_WRITE_CACHE if VolatileWriteCache(cdw11).wce() == 1 => {}
            fid::VOLATILE_WRITE_CACHE | fid::INTERRUPT_COALESCING | fid::INTERRUPT_VECTOR => {
                return Err(Fault::at(Status::FEATURE_NOT_CHANGEABLE.dnr(), byte::CDW10));
            }
            fid::NUMBER_OF_QUEUES => return self.set_number_of_queues(cdw11),
            fid::WRITE_ATOMICITY => {
                self.features.write_atomicity = WriteAtomicity::default().with_dn(WriteAtomicity(cdw11).dn()).0;
            }
            fid::ASYNC_EVENT_CONFIG => {
                let wanted = AsyncEventConfig(cdw11);
                if wanted.0 & !self.possible_events().0 != 0 {
                    return Err(Fault::field(byte::CDW11));
                }
                self.events.configure(wanted);
            }
            fid::KEEP_ALIVE_TIMER => self.set_kato(cdw11, now),
            fid::HOST_BEHAVIOR => self.set_host_behavior(data)?,
            // It comes with Connect (Base 5.1.25.1.28).
            fid::HOST_IDENTIFIER => return Err(Status::COMMAND_SEQUENCE_ERROR.dnr().into()),
            other => unreachable!("feature {other:#04x} is listed as supported"),
        }
        Ok(Step::DONE)
    }

    /// No feature has a value for each namespace; error recovery, which the specification has for each, has the same
    /// for all.
    fn check_feature_nsid(&self, set: &SetFeatures) -> Result<(), Fault> {
        if matches!(set.nsid, 0 | NSID_ALL) {
            return Ok(());
        }
        if set.fid != fid::ERROR_RECOVERY {
            return Err(Fault::at(Status::FEATURE_NOT_NS_SPECIFIC.dnr(), byte::NSID));
        }
        let known = self.subsystem().is_some_and(|subsystem| subsystem.namespaces.contains_key(&set.nsid));
        if known { Ok(()) } else { Err(Fault::at(Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), byte::NSID)) }
    }

    fn set_temperature(&mut self, wanted: TemperatureThreshold) -> Result<(), Fault> {
        let kelvin = wanted.tmpth() as u16;
        match (wanted.tmpsel(), wanted.thsel()) {
            (COMPOSITE | ALL_SENSORS, 0) => self.features.over_kelvin = kelvin,
            (COMPOSITE | ALL_SENSORS, 1) => self.features.under_kelvin = kelvin,
            _ => return Err(Fault::field(byte::CDW11 + 2)),
        }
        Ok(())
    }

    /// Base 5.1.25.1.5. A fabrics I/O queue is a pair, so that both counts are the same: the larger one that was wanted.
    fn set_number_of_queues(&mut self, cdw11: u32) -> Result<Step, Fault> {
        let wanted = NumberOfQueues::from_cdw11(cdw11).ok_or(Fault::field(byte::CDW11))?;
        let queues = self.config.shared.io_queues();
        if !queues.is_empty() {
            return Err(Status::COMMAND_SEQUENCE_ERROR.dnr().into());
        }
        let count = wanted.submission.max(wanted.completion).min(self.features.default_io_queues);
        self.config.shared.max_io_queues.store(count, Ordering::Relaxed);
        Ok(Step::value(NumberOfQueues { submission: count, completion: count }.dw0()))
    }

    fn set_host_behavior(&mut self, data: &Buffers) -> Result<(), Fault> {
        enough(data, size_of::<HostBehavior>())?;
        let mut bytes = [0; size_of::<HostBehavior>()];
        data.read_at(0, &mut bytes);
        let wanted = HostBehavior::read_from_bytes(&bytes).map_err(|_| Status::INTERNAL_ERROR)?;
        // What the host says that it can do is believed; what it asks this controller to do it must be able to.
        let understood = wanted.acre <= 1 && wanted.etdas <= 1 && wanted.lbafee == 0 && wanted.hdisns <= 1;
        if !understood || wanted.cdfe.get() != 0 {
            return Err(Status::INVALID_FIELD.dnr().into());
        }
        let mut kept = HostBehavior::new_zeroed();
        (kept.acre, kept.etdas, kept.hdisns) = (wanted.acre, wanted.etdas, wanted.hdisns);
        self.features.host_behavior = kept;
        Ok(())
    }

    /// The events that the host can ask for: OAES, and the SMART ones that every I/O controller has.
    fn possible_events(&self) -> AsyncEventConfig {
        let optional = self.optional_events();
        match self.config.kind {
            Kind::Io => optional.with_smart(0xff),
            Kind::Discovery => optional,
        }
    }

    /// OAES of Identify Controller.
    pub(super) fn optional_events(&self) -> AsyncEventConfig {
        match self.config.kind {
            Kind::Discovery => AsyncEventConfig::default().with_discovery_change(1),
            Kind::Io => {
                let ana = self.subsystem().is_some_and(|subsystem| subsystem.ana_reporting);
                AsyncEventConfig::default().with_ns_attribute(1).with_ana_change(ana.into())
            }
        }
    }
}
