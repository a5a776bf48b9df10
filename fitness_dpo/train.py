from fitness_dpo.cli import verb
from fitness_dpo.config import TrainConfig
def main(c, f): print(c)
if __name__=="__main__": verb("config", TrainConfig, main)
