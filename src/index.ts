/** hardmine's public API. */
export {
  type AlignFolderOptions,
  type AlignFolderResult,
  alignFolder,
} from './align/align-folder.js';
export {
  type AlignedFace,
  FaceAligner,
  type FaceAlignerOptions,
  type FaceChoice,
  type Fallback,
} from './align/aligner.js';
export type { Box } from './align/boxes.js';
export type { DetectedFace } from './align/mtcnn.js';
export type { FaceSize, Point } from './align/similarity.js';
export { type Config, type ConfigInput, resolveConfig } from './config.js';
export {
  type DataOptions,
  type DataProgress,
  type Dataset,
  type OpenOptions,
  openDataset,
} from './data/dataset.js';
export { type GeneratedFacesOptions, generateFaces } from './data/generated-faces.js';
export { type Inspection, type InspectOptions, inspectDataset } from './data/inspect.js';
export { type PackResult, packDataset, type Selection as PackSelection } from './data/pack.js';
export { type Device, devices } from './devices.js';
export { type ErrorCode, HardmineError } from './errors.js';
export { type BinResult, type EvaluateBin, evaluateBin } from './evaluate/bin.js';
export { type CfpResult, type EvaluateCfp, evaluateCfp } from './evaluate/cfp.js';
export {
  type EvaluateIdentification,
  evaluateIdentification,
  type IdentificationResult,
} from './evaluate/identification.js';
export type { AlignFace } from './evaluate/image-source.js';
export { type EvaluateLfw, evaluateLfw, type LfwResult } from './evaluate/lfw.js';
export {
  type EmbedForPairs,
  type EvaluatePairs,
  embedForPairs,
  evaluatePairs,
  type PairsResult,
  pixelSimilarity,
  type ScoredPair,
  type ScoreModel,
  type VerificationPair,
} from './evaluate/pairs.js';
export type { ProtocolName } from './evaluate/protocols.js';
export { type McNemar, mcnemar } from './evaluate/statistics.js';
export {
  type LabelledDistances,
  type VerificationResult,
  verification,
} from './evaluate/verification.js';
export { type Aggregate, type EvaluateYtf, evaluateYtf, type YtfResult } from './evaluate/ytf.js';
export {
  type HeadInput,
  type HeadOutput,
  type HeadStep,
  type HeadStepSettings,
  MarginHead,
  type MarginHeadOptions,
} from './head.js';
export type { BaseLoss, CenterLoss, LambdaAnnealing, LossSettings, Weighting } from './loss.js';
export {
  type EmbedOptions,
  FaceModel,
  type ModelInfo,
  type ModelOptions,
  type OnnxCheck,
} from './model.js';
export type { DeviceName, Implementation, Precision } from './native.js';
export type { DataSource, Samples } from './train/data-source.js';
export type { WarningKind } from './train/health.js';
export {
  type CheckpointEvent,
  type EpochEvent,
  type EvaluationEvent,
  type SkippedEvent,
  type StepEvent,
  Trainer,
  type TrainerEvent,
  type TrainerInput,
  type TrainerOptions,
  type TrainingPlan,
  type ValidationEvent,
  type WarningEvent,
} from './trainer.js';
export { weightLosses } from './weighting.js';
